import random

import numpy as np
import pytest
import sentencepiece

from infini_ds.data.sentencepiece_tokenizer import train_sentencepiece
from infini_ds.data.tokenizer import load_tokenizer
from infini_ds.data.tokenizer_base import ByteTokenizer
from infini_ds.errors import UserError

SOURCE = "".join(
    f"def function_{i}(first, second):\n    if first > {i}:\n        return second\n\n\n"
    for i in range(300)
)
TEXTS = {
    "plain": "def f(x):\n    return x\n",
    "unicode": "naïve Straße 日本語 العربية e\u0301 \u00a0\u3000\u200b\ufeff",
    "emoji": "🎉👩\u200d👩\u200d👧\U0001f1e9\U0001f1ea",
    "crlf": "a\r\nb\r\n\r\n  c\r",
    "tabs": "\tif x:\n\t\treturn\t\t\n",
    "nul": "a\0b\0\0",
    "spaces": "   leading, inner   and trailing   ",
    "only_spaces": "     ",
    "newlines": "\n\n\n\n",
    "space_mark": "\u2581a\u2581\u2581 b \u2581",
    "special_names": "<s></s><unk><0x41> \u2585 \u2047 \ufffd",
    "controls": "\x01\x1b[0m\x7f\x85\u2028",
    "empty": "",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    train_sentencepiece(iter([SOURCE]), 400, path)
    return path


@pytest.fixture(params=["bytes", "sentencepiece"])
def tokenizer(request, model):
    return load_tokenizer(request.param, model)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_encode_is_lossless_and_counts_its_bytes(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)


def test_encode_is_lossless_for_random_characters(tokenizer):
    draw = random.Random(0)
    codes = [c for c in range(0x3000) if not 0xD800 <= c < 0xE000] + [0x2581] * 500 + [0x20] * 2000
    for _ in range(50):
        text = "".join(chr(draw.choice(codes)) for _ in range(200))
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_encode_is_lossless_for_a_text_longer_than_a_piece(tokenizer):
    text = "x" * 300_000 + "é🎉 \u2581\n" * 50_000
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_byte_tokenizer_ids_are_byte_values():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("aé") == [97, 0xC3, 0xA9]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (258, 256, 257)
    assert tokenizer.token_bytes.tolist() == [1] * 256 + [0, 0]
    assert tokenizer.token_bytes.dtype == np.int32


def test_decode_ignores_bos_and_eos_and_replaces_broken_utf8(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("é"), tokenizer.eos_id]
    assert tokenizer.decode(ids) == "é"
    # Both fall back to bytes for é: without its last byte a half of it is left.
    assert tokenizer.decode(tokenizer.encode("é")[:-1]) == "\ufffd"


def test_sentencepiece_ids_and_cheap_indentation(model):
    tokenizer = load_tokenizer("sentencepiece", model)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (400, 1, 2)
    assert tokenizer.token_bytes[:3].tolist() == [0, 0, 0]
    assert len(tokenizer.encode("\n")) == 1
    assert len(tokenizer.encode(":\n        return")) <= 3
    assert tokenizer.decode([0]) == ""


def test_train_sentencepiece_twice_gives_the_same_model(model, tmp_path):
    train_sentencepiece(iter([SOURCE]), 400, tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == model.read_bytes()


def test_train_sentencepiece_prints_nothing(tmp_path, capfd):
    train_sentencepiece(iter([SOURCE, "a\0b"]), 400, tmp_path / "quiet.model")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("texts", "vocab_size", "says"),
    [
        (["abc abc"], 4096, "at most"),
        (["".join(map(chr, range(32, 2000))) * 20], 400, "too small"),
        ([""], 400, "no tokenizer can be trained"),
        (["abc"], 4_000_000_000, "no tokenizer can be trained"),
    ],
    ids=["corpus_too_small", "vocabulary_too_small", "no_text", "no_number_of_32_bits"],
)
def test_train_sentencepiece_refuses(tmp_path, texts, vocab_size, says):
    with pytest.raises(UserError, match=rf"^data\.tokenizer\.vocab_size \({vocab_size}\).*{says}"):
        train_sentencepiece(iter(texts), vocab_size, tmp_path / "x.model")
    assert not (tmp_path / "x.model").exists()


def _foreign_model(path, **options):
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SOURCE.split("\n")), model_writer=file, minloglevel=3, **options
        )


def test_load_tokenizer_accepts_a_foreign_model_with_other_ids(tmp_path):
    path = tmp_path / "foreign.model"
    _foreign_model(path, vocab_size=200, pad_id=0, unk_id=3, hard_vocab_limit=False)
    tokenizer = load_tokenizer("sentencepiece", path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    ids = tokenizer.encode("def function_1")
    assert tokenizer.decode(ids).strip() == "def function_1"
    assert tokenizer.token_bytes[ids].sum() == len(tokenizer.decode(ids))


def test_load_tokenizer_refuses_a_model_without_bos(tmp_path):
    path = tmp_path / "foreign.model"
    _foreign_model(path, vocab_size=200, bos_id=-1, hard_vocab_limit=False)
    with pytest.raises(UserError, match="must have a BOS id"):
        load_tokenizer("sentencepiece", path)


@pytest.mark.parametrize("content", [None, b"", b"not a model"], ids=["missing", "empty", "text"])
def test_load_tokenizer_refuses_a_file_that_is_no_model(tmp_path, content):
    path = tmp_path / "x.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"data\.tokenizer\.model .*x\.model"):
        load_tokenizer("sentencepiece", path)
