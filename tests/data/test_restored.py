"""A tokenizer that does not give a text back is measured, told, and refused if it loses much."""

import io
import json

import pytest
import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from infini_ds.config import DataConfig, TokenizerConfig
from infini_ds.data import prepare as prepare_module
from infini_ds.data.encoding import encode
from infini_ds.data.mixture import Mixture
from infini_ds.data.prepare import prepare
from infini_ds.data.restored import loss_of, restored
from infini_ds.data.store import Store, restored_share
from infini_ds.data.tokenizer import load_tokenizer
from infini_ds.errors import UserError
from tests.data.tokenizer_files import SOURCE, byte_level, sentencepiece_like

CODE = "def function(first, second):\n    if first > second:\n        return second\n\n\n"
PROSE = "The letter came on a Monday, in the rain. Nobody had asked for it; nobody read it.\n"
TEXT = PROSE * 9 + CODE


def model(**options) -> bytes:
    """A sentencepiece model as its trainer makes it, but for some options."""
    file = io.BytesIO()
    options = {"vocab_size": 300, "hard_vocab_limit": False, "minloglevel": 3, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((SOURCE + PROSE * 20).split("\n")), model_writer=file, **options
    )
    return file.getvalue()


def normalised(*steps) -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Sequence(list(steps))
    return tokenizer


def of_words() -> Tokenizer:
    words = ["<unk>", "<|begin|>", "<|end|>", *sorted({*PROSE.split()})]
    vocabulary = {("▁" if i > 2 else "") + word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens(words[:3])
    return tokenizer


EVERYTHING = {"byte_fallback": True, "normalization_rule_name": "identity"}
SAME = {
    "byte_level": byte_level,
    "nfc": lambda: normalised(normalizers.NFC()),
    "own_model": lambda: model(
        **EVERYTHING, remove_extra_whitespaces=False, add_dummy_prefix=False
    ),
}
# The share that comes back of TEXT, from so much to so much.
MILD = {
    "space_before": (lambda: model(**EVERYTHING, remove_extra_whitespaces=False), 1.0, 1.0),
    "space_before_json": (sentencepiece_like, 1.0, 1.0),
    "space_before_bytes": (lambda: spaced(), 1.0, 1.0),
    "newlines": (lambda: normalised(normalizers.Replace("\n", " ")), 0.97, 0.99),
    "lower_case": (lambda: normalised(normalizers.Lowercase()), 0.95, 0.99),
    "stripped": (lambda: normalised(normalizers.Strip()), 0.99, 1.0),
    "no_commas": (lambda: normalised(normalizers.Replace(Regex("[,;]"), "")), 0.95, 0.995),
}
LOSING = {
    "no_spaces": (lambda: normalised(normalizers.Replace(" ", "")), 0.7, 0.85),
    "words": (of_words, 0.5, 0.9),
    "word_model": (lambda: model(model_type="word", vocab_size=12), 0.2, 0.9),
    "unknown_script": (lambda: unknown_script(), 0.0, 0.0),
    "no_vowels": (lambda: normalised(normalizers.Replace(Regex("[aeiou]"), "")), 0.5, 0.8),
    "masked": (lambda: normalised(normalizers.Replace(Regex("[a-z]"), "x")), 0.1, 0.5),
}


def unknown_script() -> Tokenizer:
    """Of a text in a script that it has no token of: nothing but unknown ones."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("漢", -1.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def spaced() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def written(folder, content) -> TokenizerConfig:
    if isinstance(content, bytes):
        (folder / "a.model").write_bytes(content)
        return TokenizerConfig(kind="sentencepiece", model=str(folder / "a.model"))
    content.save(str(folder / "tokenizer.json"))
    bos, eos = ("<|begin|>", "<|end|>") if content.token_to_id("<|begin|>") else ("<s>", "</s>")
    settings = {"bos_token": bos, "eos_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return TokenizerConfig(kind="tokenizers", model=str(folder / "tokenizer.json"))


def config_of(folder, tokenizer, **settings):
    for number in range(4):
        (folder / f"{number}.txt").write_text(f"{TEXT}{number}\n")
    tokenizer = tokenizer.model_copy(update=settings)
    files = [str(folder / "*.txt")]
    return DataConfig(
        source="files", files=files, store=str(folder / "store"), tokenizer=tokenizer,
        held_out_fraction=0.5,
    )  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_nothing_is_said_where_the_text_comes_back(tmp_path, name, capsys):
    store = prepare(
        config_of(tmp_path, written(tmp_path, SAME[name]()), min_restored=1.0), workers=1
    )
    assert "restored" not in capsys.readouterr().out
    sizes = store.manifest["splits"].values()
    assert all(size["bytes"] == size["token_bytes"] == size["restored_bytes"] for size in sizes)
    assert [store.split(split).byte_scale for split in ("train", "held_out")] == [1.0, 1.0]


@pytest.mark.parametrize("name", MILD)
def test_a_mild_change_is_told(tmp_path, name, capsys):
    make, least, most = MILD[name]
    store = prepare(config_of(tmp_path, written(tmp_path, make())), workers=1)
    printed = capsys.readouterr().out
    share = restored_share(store.manifest["splits"])
    assert least <= share <= most
    assert "restored" in printed
    assert f"{restored_share({'': store.manifest['splits']['train']}):.2%}" in printed
    assert "warning: the tokenizer changes text: '" in printed
    assert "' comes back as '" in printed


@pytest.mark.parametrize("name", LOSING)
def test_a_loss_is_refused(tmp_path, name):
    make, least, most = LOSING[name]
    config = config_of(tmp_path, written(tmp_path, make()))
    with pytest.raises(UserError) as raised:
        prepare(config, workers=1)
    said = str(raised.value)
    assert said.startswith(f"data.tokenizer.min_restored (0.9): {config.tokenizer.model} restores ")
    share = float(said.partition("restores ")[2].partition("%")[0]) / 100
    assert least <= share <= most
    assert " comes back as " in said
    assert "\n" not in said
    assert not (tmp_path / "store").exists()
    asked = config.tokenizer.model_copy(update={"min_restored": 0.0})
    store = prepare(config.model_copy(update={"tokenizer": asked}), workers=1)
    assert restored_share(store.manifest["splits"]) == pytest.approx(share, abs=1e-4)
    with pytest.raises(UserError, match=r"min_restored \(0\.9\): .*lower it"):
        Store.open(store.path, config)


def test_a_large_corpus_is_refused_before_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "_SURE_BYTES", 3000)
    monkeypatch.setattr("infini_ds.data.encoding._BATCH_CHARACTERS", 1)
    config = config_of(tmp_path, written(tmp_path, LOSING["no_spaces"][0]()))
    for number in range(5, 20):
        (tmp_path / f"{number}.txt").write_text(f"{TEXT}{number}")
    read = []
    batches = prepare_module.encoded_batches
    monkeypatch.setattr(
        prepare_module, "encoded_batches",
        lambda *given: (read.append(batch) or batch for batch in batches(*given)),
    )  # fmt: skip
    with pytest.raises(UserError, match="restores 8"):
        prepare(config, workers=1)
    assert len(read) < 15


CHANGES = {
    "same": (b"abc", b"abc", (3, 3, "")),
    "space_before": (b"abc", b" abc", (4, 3, "'abc' comes back as ' abc'")),
    "newline": (b"a\nb", b" a b", (4, 2, "'a\\nb' comes back as 'a b'")),
    "nothing": (b"abc", b"", (0, 0, "'abc' comes back as ''")),
    "end": (b"abc", b"ab", (2, 2, "'abc' comes back as 'ab'")),
    "more": (b"abc", b"abcabc", (6, 3, "'abc' comes back as 'abcabc'")),
    "characters": ("é漢".encode(), "e漢".encode(), (4, 3, "'é漢' comes back as 'e漢'")),
    "late": (b"x" * 99 + b"\n" + b"y" * 99, b"x" * 99 + b" " + b"y" * 99, (199, 198, None)),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_bytes_that_come_back_are_counted(name):
    class Fixed:
        def bytes_of(self, ids):
            return back

    content, back, expected = CHANGES[name]
    found = restored(Fixed(), [], content)  # type: ignore[arg-type]
    assert found[:2] == expected[:2]
    if expected[2] is not None:
        assert found.change == expected[2]
    assert len(found.change) < 120


def test_commands_say_what_is_lost_of_their_text(tmp_path):
    tokenizer = written(tmp_path, LOSING["no_spaces"][0]())
    loaded = load_tokenizer(tokenizer.kind, tokenizer.model)
    texts = [text.encode() for text in ("ab cd", "abcde", " ")]
    found = [(restored(loaded, loaded.encode_array(t.decode()), t), len(t)) for t in texts]
    assert loss_of(found) == ["warning: the tokenizer restores 81.82% of the bytes of the text"]
    assert loss_of(found[1:2]) == loss_of([]) == []


def test_bits_per_byte_are_over_the_text_as_it_was(tmp_path):
    config = config_of(tmp_path, written(tmp_path, LOSING["no_spaces"][0]()), min_restored=0)
    store = prepare(config, workers=1)
    held_out = store.split("held_out")
    text_bytes = store.manifest["splits"]["held_out"]["bytes"]
    token_bytes = store.tokenizer.token_bytes[held_out.data].sum()
    assert held_out.byte_scale == pytest.approx(text_bytes / token_bytes)
    assert held_out.byte_scale > 1.1
    whole = store.unigram_bits_per_byte()
    held_out.text_bytes = 0  # as in a store of before
    assert store.unigram_bits_per_byte() == pytest.approx(whole * text_bytes / token_bytes)
    joined = Mixture({"a": Store.open(store.path), "b": Store.open(store.path)}, [1, 1])
    assert joined.split("held_out").byte_scale == pytest.approx(text_bytes / token_bytes)


def test_a_store_of_before_says_nothing_of_it(tmp_path):
    config = config_of(tmp_path, written(tmp_path, LOSING["no_spaces"][0]()), min_restored=0)
    store = prepare(config, workers=1)
    for split in store.manifest["splits"].values():
        del split["token_bytes"], split["restored_bytes"]
    (store.path / "manifest.json").write_text(json.dumps(store.manifest))
    asked = config.tokenizer.model_copy(update={"min_restored": 1.0})
    again = Store.open(store.path, config.model_copy(update={"tokenizer": asked}))
    assert again.split("train").byte_scale == 1.0


@pytest.mark.parametrize("value", [-0.1, 1.1, 90])
def test_share_must_be_one(value):
    with pytest.raises(ValueError, match=r"min_restored \(.*\) must be from 0 to 1"):
        TokenizerConfig(min_restored=float(value))


def test_bytes_of_ids_are_those_of_decode(tmp_path, monkeypatch):
    monkeypatch.setattr("infini_ds.data.tokenizer_base._IDS_AT_ONCE", 10)
    for tokenizer in (load_tokenizer("bytes"), load_tokenizer(*_kind(tmp_path))):
        tokens = encode(tokenizer, TEXT).tokens
        assert tokenizer.bytes_of(tokens).decode() == TEXT
        assert tokenizer.bytes_of(tokens[:0]) == b""


def _kind(folder):
    tokenizer = written(folder, byte_level())
    return tokenizer.kind, tokenizer.model
