"""A tokenizer.json gives the ids of transformers, and is known without the files beside it."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models

from infini_ds.config import DataConfig, TokenizerConfig
from infini_ds.data.prepare import prepare
from infini_ds.data.store import Store
from infini_ds.data.tokenizer import load_tokenizer
from infini_ds.data.tokenizer_base import PIECE_CHARACTERS, SPACE_MARK
from infini_ds.data.tokenizer_json import TokenizerJson
from infini_ds.errors import UserError
from tests.data.test_tokenizer import TEXTS
from tests.data.tokenizer_files import SPECIAL, byte_level, sentencepiece_like, write_byte_level

LONG = "".join(f"line {i} of 漢字  é\n\n\tand <think> more" + "\n" * (i % 3) for i in range(10_000))
KINDS = {"byte_level": byte_level, "sentencepiece_like": sentencepiece_like}


@pytest.fixture(scope="module", params=KINDS)
def file(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "byte_level":
        return write_byte_level(folder)
    sentencepiece_like().save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"bos_token_id": 1, "eos_token_id": [2, 0]}')
    return folder / "tokenizer.json"


def of_transformers(file, text):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(file))
    return theirs.encode(text, add_special_tokens=False, split_special_tokens=True)


@pytest.mark.parametrize("text", [*TEXTS.values(), "<|begin|>a <think> b<|end|>"])
def test_ids_are_those_of_transformers(file, text):
    tokenizer = load_tokenizer("tokenizers", file)
    ids = tokenizer.encode(text)
    if SPACE_MARK in text and "sentencepiece_like" in str(file):
        assert tokenizer.decode(ids) == f" {text}"  # which becomes spaces in transformers
    else:
        assert ids == of_transformers(file, text)
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_bytes_of_tokens_are_those_of_the_text(tmp_path, text):
    tokenizer = load_tokenizer("tokenizers", write_byte_level(tmp_path))
    ids = tokenizer.encode(text)
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_a_long_text_is_cut_where_no_token_changes(file):
    tokenizer = load_tokenizer("tokenizers", file)
    assert isinstance(tokenizer, TokenizerJson)
    pieces = list(tokenizer._pieces(LONG))
    assert "".join(pieces) == LONG
    assert len(pieces) == 1 + len(LONG) // PIECE_CHARACTERS
    assert len(LONG) > PIECE_CHARACTERS
    assert tokenizer.encode(LONG) == of_transformers(file, LONG)


def test_a_space_before_the_text_counts(tmp_path):
    sentencepiece_like().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')
    tokenizer = load_tokenizer("tokenizers", tmp_path / "tokenizer.json")
    assert tokenizer.decode(tokenizer.encode("def f(漢):\n")) == " def f(漢):\n"
    assert tokenizer.token_bytes[:4].tolist() == [0, 0, 0, 1]


def test_special_tokens_stand_for_nothing_and_others_for_themselves(tmp_path):
    tokenizer = load_tokenizer("tokenizers", write_byte_level(tmp_path))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (404, 400, 401)
    assert tokenizer.table[400:] == [b"", b"", b"", b"<think>"]


def test_saved_it_is_the_same_and_keeps_other_settings(file, tmp_path):
    tokenizer = load_tokenizer("tokenizers", file)
    tokenizer.save(tmp_path)
    again = load_tokenizer("tokenizers", tmp_path / "tokenizer.json")
    assert again.fingerprint == tokenizer.fingerprint
    assert (again.bos_id, again.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    before = file.with_name("tokenizer_config.json")
    if before.exists():
        assert saved == json.loads(before.read_text())
    else:
        assert saved == {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        }  # fmt: skip


def test_fingerprint_tells_another_end_of_documents(tmp_path):
    file = write_byte_level(tmp_path)
    before = load_tokenizer("tokenizers", file).fingerprint
    settings = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[2]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer("tokenizers", file).fingerprint != before


def test_store_is_made_and_opened_without_the_model_it_is_of(tmp_path):
    (tmp_path / "model").mkdir()
    file = write_byte_level(tmp_path / "model")
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(LONG[: 4000 + number])
    config = DataConfig(
        source="files", files=[str(tmp_path / "*.txt")], store=str(tmp_path / "store"),
        held_out_fraction=0.0, tokenizer=TokenizerConfig(kind="tokenizers", model=str(file)),
    )  # fmt: skip
    prepare(config, workers=2)
    assert prepare(config).manifest["tokenizer"]["vocab_size"] == 404
    expected = [400, *of_transformers(file, LONG[:4000]), 401]
    file.unlink()
    store = Store.open(config.store)
    assert store.split("train").tokens(0, 0, 10**6).tolist() == expected
    assert store.tokenizer.decode(expected) == LONG[:4000]


def spoiled(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content)


MISTAKES = {
    "no_json": ({"tokenizer": "{"}, r"tokenizer\.json: no tokenizer\.json \("),
    "no_bos": (
        {"tokenizer_config": '{"eos_token": "<|end|>"}', "config": '{"bos_token_id": null}'},
        r"must have a BOS, has none; put `bos_token` into a tokenizer_config\.json beside it",
    ),
    "unknown_token": (
        {"tokenizer_config": '{"bos_token": "<s>"}'},
        r"tokenizer_config\.json: bos_token \(<s>\) must be a token of tokenizer\.json",
    ),
    "unknown_id": (
        {"tokenizer_config": "{}", "config": '{"bos_token_id": 404}'},
        r"config\.json: bos_token_id \(404\) must be a token of tokenizer\.json",
    ),
    "settings": ({"tokenizer_config": "[]"}, r"tokenizer_config\.json: must be a mapping"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_is_wrong_is_named(name, tmp_path):
    files, message = MISTAKES[name]
    file = write_byte_level(tmp_path)
    spoiled(tmp_path, **files)
    with pytest.raises(UserError, match=message) as raised:
        load_tokenizer("tokenizers", file)
    assert "\n" not in str(raised.value)


WRONG = {
    "bos_token": [5, {"x": 1}, ["<|begin|>"], {"content": 5}, False],
    "bos_token_id": [-1, "1", [], 1.5, {}, 10**12, True, [None]],
}


@pytest.mark.parametrize("name", WRONG)
def test_bos_of_a_wrong_type_is_named(name, tmp_path):
    file = write_byte_level(tmp_path)
    for value in WRONG[name]:
        spoiled(tmp_path, tokenizer_config=json.dumps({name: value}))
        with pytest.raises(UserError, match=rf"{name} \(.*\) must be a token of"):
            load_tokenizer("tokenizers", file)


def test_a_decoder_that_hides_what_tokens_stand_for_is_refused(tmp_path):
    file = write_byte_level(tmp_path)
    tokenizer = Tokenizer(models.WordLevel({"<|begin|>": 0, "<|end|>": 1}, "<|begin|>"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(file))
    with pytest.raises(UserError, match=r"its decoder \(WordPiece\) must have ByteLevel, "):
        load_tokenizer("tokenizers", file)


def test_kind_without_a_file_is_refused():
    with pytest.raises(ValueError, match=r"must name a tokenizer\.json when kind is tokenizers"):
        TokenizerConfig(kind="tokenizers")
