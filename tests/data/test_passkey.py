import re
import subprocess
import sys
import time

import numpy as np
import pytest

from infini_ds.config import DataConfig, PasskeyConfig, TokenizerConfig, load
from infini_ds.data.filler import STANDARD
from infini_ds.data.lanes import held_out_plans
from infini_ds.data.passkey import NAMES, Passkeys, passkey_random
from infini_ds.data.prepare import prepare
from infini_ds.data.store import Store
from infini_ds.data.windows import read_windows, total_weight
from infini_ds.errors import UserError
from tests.pages import ROOT

N = 128
KEY = re.compile(
    rb" The (pass key[a-zA-Z ]*) is (\d+)\. Remember it\. (\d+) is the pass key[a-zA-Z ]*\. "
)
QUESTION = re.compile(rb" What is the (pass key[a-zA-Z ]*)\? The (pass key[a-zA-Z ]*) is $")


def config_of(**settings):
    return PasskeyConfig(**({"segment_length": N} | settings))


def documents_of(config, segments, count=200, **options):
    passkeys = Passkeys(config)
    return [
        passkeys.document(passkey_random(1, number), segments, **options) for number in range(count)
    ]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i:04d}: ünïcode\n" for i in range(50)))
    return path


@pytest.fixture(params=["standard", "noise", "text"])
def filler(request, text):
    return {"filler": request.param, "text_files": [str(text)]}


@pytest.mark.parametrize("segments", [2, 3, 16])
@pytest.mark.parametrize("keys", [1, 2])
def test_document_is_whole_segments_and_ends_with_the_answer(filler, segments, keys):
    config = config_of(keys=keys, segment_length=256, **filler)
    for document in documents_of(config, segments, 50):
        content = document.prompt + document.answer
        assert len(content) == segments * 256 - 1
        content.decode("ascii")
        question = QUESTION.search(document.prompt)
        assert question
        assert question[1] == question[2]
        stated = {match[1]: match[2] for match in KEY.finditer(document.prompt)}
        assert len(stated) == keys
        assert stated[question[1]] == document.answer
        assert re.fullmatch(rb"\d{5}", document.answer)
        assert document.prompt[document.position :].startswith(b"The " + question[1] + b" is ")
        # BOS is position 0: byte i is position i + 1.
        assert question.start() + 1 >= (segments - 1) * 256
        assert all(match.end() < (segments - 1) * 256 for match in KEY.finditer(document.prompt))


def test_document_key_is_anywhere_before_the_last_segment_and_may_be_cut():
    documents = documents_of(config_of(), 4, 2000)
    positions = np.array([document.position for document in documents])
    statement = len(" The pass key is 71432. Remember it. 71432 is the pass key. ")
    room = 3 * N - 1 - statement
    assert positions.min() <= 5
    assert positions.max() >= room - 5
    quarters = np.histogram(positions - 1, 4, (0, room + 1))[0]
    assert quarters.min() > 400
    for document in documents:
        first, last = document.position + 1, document.position + statement - 2
        assert document.cut == (first // N != last // N)
    assert 0.2 < np.mean([document.cut for document in documents]) < 0.5


def test_document_depth_says_where_the_key_stands():
    statement = len(" The pass key is 71432. Remember it. 71432 is the pass key. ")
    for depth, position in ((0.0, 1), (1.0, 7 * N - statement), (0.5, (7 * N - statement) // 2)):
        for document in documents_of(config_of(), 8, 10, depth=depth):
            assert document.position == pytest.approx(position, abs=1)


def test_document_answers_have_all_digits_and_differ():
    answers = [document.answer for document in documents_of(config_of(digits=3), 2, 500)]
    assert {len(answer) for answer in answers} == {3}
    assert len(set(answers)) > 300
    assert set(b"".join(answers)) == set(b"0123456789")


def test_document_of_several_keys_asks_for_any_of_them():
    config = config_of(keys=3)
    places = [0, 0, 0]
    names = set()
    for document in documents_of(config, 8):
        found = [match[1] for match in KEY.finditer(document.prompt)]
        assert len(set(found)) == 3
        asked = QUESTION.search(document.prompt)
        assert asked
        places[found.index(asked[1])] += 1
        names.add(asked[1])
    assert min(places) > 40
    assert len(names) > 40


def test_document_is_a_function_of_its_random_numbers(filler):
    config = config_of(**filler)
    one, two = documents_of(config, 4, 5), documents_of(config, 4, 5)
    assert one == two
    assert len(set(one)) == 5


def test_document_is_that_of_other_machines():
    # Stores made on two machines must be equal: this must never change.
    document = Passkeys(config_of(filler="noise")).document(passkey_random(0, 2, 0), 2)
    assert (document.answer, document.position) == (b"95809", 20)
    assert document.prompt[:19] == b"yt t vaoupvwndoytzw"


def test_standard_filler_begins_anywhere_in_its_sentences():
    documents = documents_of(config_of(), 3, 300, depth=1.0)
    beginnings = {document.prompt[: len(STANDARD)] for document in documents}
    assert len(beginnings) > 60
    assert all(beginning in STANDARD * 2 for beginning in beginnings)


def test_noise_filler_is_letters_and_spaces_of_equal_chance():
    document = documents_of(config_of(filler="noise"), 2000, 1)[0]
    noise = document.prompt[: document.position - 1]
    counts = np.bincount(np.frombuffer(noise, np.uint8), minlength=128)
    letters = counts[ord("a") : ord("z") + 1]
    assert letters.sum() + counts[ord(" ")] == len(noise)
    assert letters.max() < 1.2 * letters.min()


def test_text_filler_is_lines_of_the_files_from_a_line_s_beginning(text):
    config = config_of(filler="text", text_files=[str(text)])
    lines = [f"line {i:04d}: ncode\n".encode() for i in range(50)]
    first = {document.prompt[:17] for document in documents_of(config, 4, depth=1.0)}
    assert first <= set(lines)
    assert len(first) > 40
    # A document that is longer than the text begins it again.
    assert b"".join(lines) * 2 in documents_of(config, 40, 1, depth=1.0)[0].prompt


def test_text_filler_is_python_s_sources_by_default():
    config = config_of(filler="text")
    assert b"import" in b"".join(document.prompt for document in documents_of(config, 64, 20))


@pytest.mark.parametrize("filler", ["standard", "noise"])
def test_document_of_thousands_of_segments_is_fast(filler):
    passkeys = Passkeys(config_of(filler=filler))
    began = time.process_time()
    document = passkeys.document(passkey_random(1), 8192)
    assert time.process_time() - began < 1  # about 5 ms on an idle core
    assert len(document.prompt + document.answer) == 8192 * N - 1


def test_passkeys_refuse_segments_that_are_too_short():
    Passkeys(config_of(segment_length=64)).document(passkey_random(0), 2)
    for settings, segments in (({"segment_length": 32}, 2), ({"keys": 3}, 2)):
        with pytest.raises(
            UserError, match=r"^data\.passkey\.segment_length \(\d+\) must be at le"
        ):
            Passkeys(config_of(**settings)).document(passkey_random(0), segments)


def test_passkeys_refuse_more_keys_than_names():
    with pytest.raises(UserError, match=r"^data\.passkey\.keys \(65\) must be at most 64"):
        Passkeys(config_of(keys=65))
    assert {len(name) for name in NAMES} == {4}


def test_passkeys_refuse_text_files_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match=r"^data\.passkey\.text_files .*none\.txt: no such file"):
        Passkeys(config_of(filler="text", text_files=[str(tmp_path / "none.txt")]))


def test_passkeys_refuse_text_files_without_text(tmp_path):
    (tmp_path / "a.txt").write_text("é")
    passkeys = Passkeys(config_of(filler="text", text_files=[str(tmp_path / "a.txt")]))
    with pytest.raises(UserError, match=r"^data\.passkey\.text_files: have no text"):
        passkeys.document(passkey_random(0), 2)


def data_config(folder, **settings):
    return DataConfig(
        source="passkey",
        store=str(folder / "store"),
        tokenizer=TokenizerConfig(kind="bytes"),
        held_out_fraction=0.1,
        passkey=config_of(**({"segments": [2, 4], "documents": 40} | settings)),
    )


def test_prepare_stores_documents_of_whole_segments(tmp_path):
    store = prepare(data_config(tmp_path), workers=1)
    lengths = [*store.split("train").lengths.tolist(), *store.split("held_out").lengths.tolist()]
    assert sorted(lengths) == [2 * N + 1] * 40 + [4 * N + 1] * 40
    assert set(store.split("held_out").lengths.tolist()) == {2 * N + 1, 4 * N + 1}


def test_prepare_weighs_answers_as_all_other_tokens_together(tmp_path):
    split = prepare(data_config(tmp_path), workers=1).split("train")
    assert split.weights is not None
    for document, length in enumerate(split.lengths):
        positions = int(length) - 1
        begin, end = split.offsets[document], split.offsets[document + 1]
        weights, tokens = split.weights[begin:end].tolist(), split.data[begin:end].tolist()
        assert weights == [0] + [1] * (positions - 6) + [np.float32(1 + positions / 5)] * 5 + [1]
        assert re.fullmatch(rb"\d{5}", bytes(tokens[-6:-1]))
        assert tokens[-1] == 257
    losses = np.random.default_rng(0).random(4 * N)
    weighted = (losses * np.array([1] * (4 * N - 6) + [1 + 4 * N / 5] * 5 + [1])).sum() / (4 * N)
    assert weighted == pytest.approx(losses.mean() + losses[-6:-1].mean())


def test_windows_of_passkeys_have_no_padding_and_the_answers_weights(tmp_path):
    split = prepare(data_config(tmp_path), workers=1).split("train")
    documents = np.flatnonzero(split.lengths == 4 * N + 1)
    for plan in held_out_plans(split.lengths[documents], N, 4, 2, 0):
        plan = plan._replace(documents=documents[plan.documents])
        windows = read_windows(split, plan, slice(None), N)
        full = plan.lengths[:, 0] > 0
        assert (windows.labels[full] >= 0).all()
        assert ((windows.weights[full] > 1).sum(dim=1) == 5).all()
        assert (windows.labels[full][:, -1] == 257).all()
        assert total_weight(split, plan) == pytest.approx(2 * plan.num_tokens)


def test_store_of_other_passkeys_is_refused(tmp_path):
    config = data_config(tmp_path)
    prepare(config, workers=1)
    Store.open(config.store, config)
    for change, setting in (({"digits": 4}, "digits"), ({"documents": 41}, "documents")):
        with pytest.raises(UserError, match=rf"^data\.passkey\.{setting} is .* made with"):
            Store.open(config.store, data_config(tmp_path, **change))


def test_prepare_notices_that_text_files_changed(tmp_path, text):
    config = data_config(tmp_path, filler="text", text_files=[str(text)])
    prepare(config, workers=1)
    prepare(config, workers=1)
    text.write_text("other")
    with pytest.raises(UserError, match=r"^data\.passkey\.text_files: files have changed"):
        prepare(config, workers=1)


def test_passkey_module_needs_no_torch():
    code = "import sys, infini_ds.data.passkey, infini_ds.data.curriculum; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"torch", "deepspeed"}


@pytest.mark.parametrize("keys", [2, 4, 8, 12, 16, 32])
def test_documents_of_make_passkey_have_room_for_its_keys(keys):
    done = subprocess.run(
        ["make", "-n", "passkey", f"KEYS={keys}"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (prepare,) = (line for line in done.stdout.splitlines() if " prepare " in line)
    path, *overrides = prepare.partition(" prepare ")[2].split()
    run = load(ROOT / path, overrides)
    made = run.data.passkey
    assert made.key_counts[-1] == 2 * keys
    assert run.train.curriculum
    assert run.train.curriculum.segments == made.segments
    for number in range(20):
        Passkeys(made).document(passkey_random(0, number), made.segments[0])
