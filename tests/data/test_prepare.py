import itertools
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from infini_ds.config import DataConfig, TokenizerConfig
from infini_ds.data import corpus_files, encoding
from infini_ds.data import prepare as prepare_module
from infini_ds.data.documents import Corpus
from infini_ds.data.prepare import prepare
from infini_ds.data.sentencepiece_tokenizer import train_sentencepiece
from infini_ds.data.store import Store
from infini_ds.errors import RunError, UserError
from infini_ds.system.temporary import temporary_beside

BYTES = TokenizerConfig(kind="bytes")
SMALL = TokenizerConfig(vocab_size=400)
WORDS = ["alpha", "beta", "gamma", "delta", "épsilon", "\n    ", "return", "def", "(x)", "\u2581"]


def write_corpus(path, count, first=0):
    with path.open("w") as file:
        for i in range(first, first + count):
            draw = random.Random(i)
            text = " ".join(draw.choices(WORDS, k=draw.randint(1, 80)))
            file.write(json.dumps({"text": f"{i} {text}"}) + "\n")
    return path


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus.jsonl", 300)


@pytest.fixture
def small_batches(monkeypatch):
    """Many batches even of a small corpus, as a large one has."""
    monkeypatch.setattr(encoding, "_BATCH_DOCUMENTS", 16)


def config_of(corpus, store, tokenizer=SMALL, held_out_fraction=0.1):
    return DataConfig(
        source="files",
        files=[str(corpus)],
        store=str(store),
        tokenizer=tokenizer,
        held_out_fraction=held_out_fraction,
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def documents_of(store, name):
    split, decode = store.split(name), store.tokenizer.decode
    return [decode(split.tokens(d, 0, int(split.lengths[d]))) for d in range(len(split.lengths))]


def texts_of(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("tokenizer", [BYTES, SMALL], ids=["bytes", "sentencepiece"])
def test_prepare_stores_every_document_between_bos_and_eos(tmp_path, corpus, tokenizer):
    store = prepare(config_of(corpus, tmp_path / "store", tokenizer), workers=1)
    texts = texts_of(corpus)
    train, held_out = documents_of(store, "train"), documents_of(store, "held_out")
    assert sorted(train + held_out) == sorted(texts)
    assert train == [text for text in texts if text in set(train)]
    assert 10 <= len(held_out) <= 60
    for name in ("train", "held_out"):
        split = store.split(name)
        for document, length in enumerate(split.lengths):
            tokens = split.tokens(document, 0, int(length))
            assert tokens[0] == store.tokenizer.bos_id
            assert tokens[-1] == store.tokenizer.eos_id
            assert not set(tokens[1:-1]) & {store.tokenizer.bos_id, store.tokenizer.eos_id}
        summary = store.manifest["splits"][name]
        assert summary["documents"] == len(split.lengths)
        assert summary["tokens"] == split.lengths.sum() == len(split.data)
        assert summary["bytes"] == store.tokenizer.token_bytes[split.data].sum()


def test_prepare_counts_train_tokens_without_bos(tmp_path, corpus):
    store = prepare(config_of(corpus, tmp_path / "store"), workers=1)
    counts = np.load(tmp_path / "store" / "train.counts.npy")
    expected = np.bincount(store.split("train").data, minlength=400)
    assert expected[store.tokenizer.bos_id] == len(store.split("train").lengths)
    expected[store.tokenizer.bos_id] = 0
    assert counts.tolist() == expected.tolist()


def test_prepare_writes_the_same_with_one_and_two_workers(tmp_path, corpus, small_batches):
    one = prepare(config_of(corpus, tmp_path / "one"), workers=1)
    two = prepare(config_of(corpus, tmp_path / "two"), workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert one.fingerprint == two.fingerprint
    two.verify()


def write_conversations(path, count):
    """Records of a question without weight and an answer with weight 2."""
    records = [{"turns": [[f"question {i} é?", 0], [f" answer {i}", 2]]} for i in range(count)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_prepare_stores_a_weight_for_each_token(tmp_path):
    path = write_conversations(tmp_path / "a.jsonl", 60)
    config = config_of(path, tmp_path / "store", BYTES)
    config = config.model_copy(update={"weighted_field": "turns"})
    store = prepare(config, workers=1)
    for name in ("train", "held_out"):
        split = store.split(name)
        assert split.weights is not None
        assert len(split.weights) == len(split.data)
        for document, length in enumerate(split.lengths):
            tokens = split.tokens(document, 0, int(length)).tolist()
            weights = split.weights[split.offsets[document] : split.offsets[document + 1]]
            answer = len(tokens) - 1 - store.tokenizer.decode(tokens)[::-1].index("rewsna ") - 7
            assert weights.tolist() == [0] * answer + [2] * (len(tokens) - answer)
    files = store.manifest["files"]
    assert files["train.weights"]["size"] == 4 * len(store.split("train").data)
    Store.open(tmp_path / "store", config)
    (tmp_path / "store" / "train.weights").write_bytes(bytes(files["train.weights"]["size"]))
    with pytest.raises(UserError, match=r"train\.weights: is damaged"):
        Store.open(tmp_path / "store")
    prepare(config, force=True, workers=1)


def test_prepare_weights_are_the_same_with_one_and_two_workers(tmp_path, small_batches):
    path = write_conversations(tmp_path / "a.jsonl", 60)
    for name, workers in (("one", 1), ("two", 2)):
        config = config_of(path, tmp_path / name)
        tokenizer = TokenizerConfig(vocab_size=320)
        prepare(
            config.model_copy(update={"weighted_field": "turns", "tokenizer": tokenizer}),
            workers=workers,
        )
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_prepare_without_weights_stores_none(tmp_path, corpus):
    store = prepare(config_of(corpus, tmp_path / "store", BYTES), workers=1)
    assert store.split("train").weights is None
    assert not list((tmp_path / "store").glob("*.weights"))


def test_prepare_a_second_time_does_no_work(tmp_path, corpus, monkeypatch, capsys):
    config = config_of(corpus, tmp_path / "store")
    prepare(config, workers=1)
    monkeypatch.setattr(prepare_module, "_write_store", lambda *_: pytest.fail("worked again"))
    assert len(prepare(config).split("train").lengths) > 0
    assert "already prepared" in capsys.readouterr().out


def test_prepare_reports_splits_and_what_was_skipped(tmp_path, capsys):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "one"}\n{"text": ""}\n')
    prepare(config_of(path, tmp_path / "store", BYTES, held_out_fraction=1e-9), workers=1)
    printed = capsys.readouterr().out
    assert "held_out" in printed
    assert f"1 skipped, empty: {path}:2" in printed
    assert "warning: no document was held out" in printed


def test_prepare_holds_out_the_same_documents_when_others_are_added(tmp_path, corpus):
    more = write_corpus(tmp_path / "more.jsonl", 900, first=-300)
    few = prepare(config_of(corpus, tmp_path / "few", BYTES), workers=1)
    many = prepare(config_of(more, tmp_path / "many", BYTES), workers=1)
    common = set(texts_of(corpus)) & set(texts_of(more))
    held_out = set(documents_of(few, "held_out"))
    assert len(common) == 300
    assert held_out
    assert held_out == set(documents_of(many, "held_out")) & common


def test_prepare_with_a_given_model_copies_it(tmp_path, corpus):
    model = tmp_path / "mine.model"
    train_sentencepiece(iter(texts_of(corpus)), 350, model)
    config = config_of(corpus, tmp_path / "store", TokenizerConfig(model=str(model)))
    store = prepare(config, workers=1)
    assert store.tokenizer.vocab_size == 350
    assert (tmp_path / "store" / "tokenizer.model").read_bytes() == model.read_bytes()
    # Its place does not matter, its content does.
    moved = model.rename(tmp_path / "moved.model")
    config = config_of(corpus, tmp_path / "store", TokenizerConfig(model=str(moved)))
    Store.open(tmp_path / "store", config)
    train_sentencepiece(iter(texts_of(corpus)), 340, moved)
    with pytest.raises(UserError, match=r"^data\.tokenizer\.model is"):
        Store.open(tmp_path / "store", config)


def test_prepare_uses_four_bytes_a_token_for_a_large_vocabulary():
    assert prepare_module.token_dtype(65536) == np.uint16
    assert prepare_module.token_dtype(65537) == np.uint32


def test_prepare_replaces_another_store_only_with_force(tmp_path, corpus):
    prepare(config_of(corpus, tmp_path / "store", BYTES), workers=1)
    before = contents(tmp_path / "store")
    with pytest.raises(UserError, match=r"data\.tokenizer\.kind is 'sentencepiece'.*--force"):
        prepare(config_of(corpus, tmp_path / "store"), workers=1)
    assert contents(tmp_path / "store") == before
    store = prepare(config_of(corpus, tmp_path / "store"), force=True, workers=1)
    assert store.tokenizer.vocab_size == 400
    assert {path.name for path in tmp_path.iterdir()} == {"corpus.jsonl", "store"}


@pytest.mark.parametrize("hashed", [64 << 20, 4096], ids=["small", "large"])
@pytest.mark.parametrize("old", ["alpha", "", "omega"], ids=["begin", "added", "end"])
def test_prepare_refuses_files_that_changed_since(tmp_path, corpus, monkeypatch, hashed, old):
    monkeypatch.setattr(corpus_files, "_HASHED_WHOLE", hashed)
    monkeypatch.setattr(corpus_files, "_READ_BYTES", 1024)
    line = json.dumps({"text": "alpha"}) + "\n"
    corpus.write_text(line + corpus.read_text() + line.replace("alpha", "omega"))
    config = config_of(corpus, tmp_path / "store", BYTES)
    prepare(config, workers=1)
    changed = corpus.read_text().replace(f'{{"text": "{old}"}}', '{"text": "other"}')
    corpus.write_text(changed if old else changed + line)
    with pytest.raises(UserError, match=r"^data\.files: files have changed.*--force"):
        prepare(config, workers=1)
    corpus.unlink()
    prepare(config, workers=1)  # a store can be used without its sources


def test_prepare_takes_a_corpus_that_was_copied_for_the_same(tmp_path, corpus, monkeypatch):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    corpus.rename(tmp_path / "here" / "a.jsonl")
    monkeypatch.chdir(tmp_path / "here")
    config = config_of("a.jsonl", tmp_path / "store", BYTES)
    prepare(config, workers=1)
    shutil.copyfile("a.jsonl", tmp_path / "there" / "a.jsonl")
    monkeypatch.chdir(tmp_path / "there")
    prepare(config, workers=1)


def test_prepare_keeps_a_store_that_it_cannot_report(tmp_path, corpus, monkeypatch):
    def full(*_):
        raise RunError("standard output: cannot be written (No space left on device)")

    monkeypatch.setattr(prepare_module.Console, "print", full)
    config = config_of(corpus, tmp_path / "store[/x]", BYTES)
    with pytest.raises(RunError, match="standard output"):
        prepare(config, workers=1)
    Store.open(tmp_path / "store[/x]", config)


def test_prepare_refuses_to_hold_everything_out(tmp_path, corpus):
    config = config_of(corpus, tmp_path / "store", BYTES, held_out_fraction=1 - 1e-12)
    with pytest.raises(UserError, match=r"^data\.held_out_fraction \(.*holds out every document"):
        prepare(config, workers=1)
    assert list(tmp_path.iterdir()) == [corpus]


def test_prepare_removes_leftovers_of_a_store_named_like_a_pattern(tmp_path, corpus):
    leftover = tmp_path / ".s[1].dead.partial"
    leftover.mkdir()
    prepare(config_of(corpus, tmp_path / "s[1]", BYTES), workers=1)
    assert not leftover.exists()


def test_prepare_puts_the_old_store_back_when_the_new_one_cannot_take_its_place(
    tmp_path, corpus, monkeypatch
):
    config = config_of(corpus, tmp_path / "store", BYTES)
    prepare(config, workers=1)
    rename = Path.rename

    def broken(path, target):
        if target == tmp_path / "store" and not path.name.endswith(".old.partial"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(UserError, match=r"cannot be written \(.*Input/output error"):
        prepare(config, force=True, workers=1)
    Store.open(tmp_path / "store", config)


AGAIN = """
    import sys
    from infini_ds.config import DataConfig
    from infini_ds.data.prepare import prepare

    for _ in range(10):
        prepare(DataConfig.model_validate_json(sys.argv[1]), force=True, workers=1)
"""


def test_prepare_several_times_at_once(tmp_path, corpus):
    config = config_of(corpus, tmp_path / "store", BYTES)
    prepare(config, workers=1)
    command = [sys.executable, "-c", textwrap.dedent(AGAIN), config.model_dump_json()]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    assert [process.communicate()[1] for process in processes] == [""] * 4
    assert {path.name for path in tmp_path.iterdir()} == {"corpus.jsonl", "store"}


@pytest.mark.parametrize("force", [False, True], ids=["plain", "force"])
def test_prepare_never_deletes_what_is_not_a_store(tmp_path, corpus, force):
    place = tmp_path / "home"
    place.mkdir()
    (place / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"^data\.store .*home"):
        prepare(config_of(corpus, place, BYTES), force=force, workers=1)
    assert (place / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("before", ["nothing", "empty", "store"])
def test_prepare_writes_where_a_link_leads(tmp_path, corpus, before):
    place, link = tmp_path / "disk" / "place", tmp_path / "store"
    link.symlink_to(place)
    if before == "empty":
        place.mkdir(parents=True)
    elif before == "store":
        prepare(config_of(corpus, place, BYTES), workers=1)
    store = prepare(config_of(corpus, link), force=before == "store", workers=1)
    assert store.tokenizer.vocab_size == 400
    assert link.readlink() == place
    assert Store.open(place).fingerprint == Store.open(link).fingerprint == store.fingerprint
    assert list(place.parent.iterdir()) == [place]


def test_prepare_says_that_an_empty_directory_cannot_be_replaced(tmp_path, corpus, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=r"^data\.store \.: cannot be written \("):
        prepare(config_of(corpus, ".", BYTES), workers=1)


def test_prepare_without_any_text_leaves_nothing(tmp_path):
    (tmp_path / "corpus.jsonl").write_text('{"text": ""}\n')
    for tokenizer in (BYTES, SMALL):
        with pytest.raises(UserError, match=r"has no document with text \(1 skipped, empty"):
            prepare(config_of(tmp_path / "corpus.jsonl", tmp_path / "store", tokenizer), workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_prepare_says_when_a_worker_was_killed(tmp_path, corpus, small_batches, monkeypatch):
    (document, *_) = Corpus(config_of(corpus, tmp_path / "store"))

    def endless(_):
        for number in itertools.count():
            if number == 1000:
                multiprocessing.active_children()[0].kill()
            yield document._replace(text=document.text * 100)

    monkeypatch.setattr(Corpus, "__iter__", endless)
    with pytest.raises(UserError, match=r"process was killed near document .*corpus\.jsonl:1,"):
        prepare(config_of(corpus, tmp_path / "store", BYTES), workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]
    assert not multiprocessing.active_children()


# Endless, so that it is killed at work; each text is new, so that the workers have work too.
ENDLESS = """
    from infini_ds.config import DataConfig, TokenizerConfig
    from infini_ds.data import prepare
    from infini_ds.data.documents import Corpus, Document

    def endless(corpus):
        number = 0
        while True:
            number += 1
            yield Document(str(number), f"text {number} " * 1000)

    if __name__ == "__main__":
        Corpus.__iter__ = endless
        tokenizer = TokenizerConfig(kind="bytes")
        prepare.prepare(DataConfig(store="store", tokenizer=tokenizer), workers=2)
"""


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_prepare_killed_leaves_nothing_that_looks_finished(tmp_path, corpus):
    script = tmp_path / "endless.py"
    script.write_text(textwrap.dedent(ENDLESS))
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    process = subprocess.Popen([sys.executable, str(script)], cwd=tmp_path, env=environment)
    try:
        deadline = time.monotonic() + 60
        while not (written := list(tmp_path.glob(".store.*.partial/train.tokens"))) or (
            written[0].stat().st_size < 1 << 20
        ):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
            workers = [int(pid) for pid in file.read().split()]
    finally:
        process.kill()
        process.wait()
    assert len(workers) >= 2
    assert not (tmp_path / "store").exists()
    (leftover,) = tmp_path.glob(".store.*.partial")
    with pytest.raises(UserError, match="not a finished store"):
        Store.open(leftover)
    while any(map(_alive, workers)):
        assert time.monotonic() < deadline, "workers outlive the process that started them"
        time.sleep(0.05)
    prepare(config_of(corpus, tmp_path / "store", BYTES), workers=1)
    assert not leftover.exists()


def test_prepare_leaves_the_directory_of_a_living_one_alone(tmp_path, corpus):
    path = tmp_path / "store"
    with temporary_beside(path) as unfinished:
        prepare(config_of(corpus, path, BYTES), workers=1)
        assert unfinished.is_dir()
    assert not unfinished.exists()


def test_prepare_a_document_of_ten_million_tokens(tmp_path):
    (tmp_path / "long.txt").write_text("0123456789" * 1_000_000)
    config = config_of(tmp_path / "long.txt", tmp_path / "store", BYTES, held_out_fraction=0.0)
    store = prepare(config, workers=1)
    split = store.split("train")
    assert split.lengths.tolist() == [10_000_002]
    assert split.tokens(0, 9_999_999, 20_000_000).tolist() == [ord("8"), ord("9"), 257]
