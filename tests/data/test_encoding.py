import pytest

from infini_ds.data.documents import Span
from infini_ds.data.encoding import encode
from infini_ds.data.sentencepiece_tokenizer import train_sentencepiece
from infini_ds.data.tokenizer import load_tokenizer
from infini_ds.data.tokenizer_base import ByteTokenizer


def test_encode_stores_bos_tokens_and_eos():
    encoded = encode(ByteTokenizer(), "é!")
    assert encoded.tokens.tolist() == [256, 0xC3, 0xA9, 0x21, 257]
    assert encoded.tokens.dtype == "uint16"
    assert encoded.text_bytes == 3
    assert encoded.weights is None


def test_encode_weighs_the_tokens_of_each_part_and_the_end_as_the_last():
    spans = (Span(1, 0.0), Span(2, 2.5), Span(0, 9.0), Span(1, 0.5))
    encoded = encode(ByteTokenizer(), "éab!", spans)
    assert encoded.tokens.tolist() == [256, 0xC3, 0xA9, 0x61, 0x62, 0x21, 257]
    assert encoded.weights is not None
    assert encoded.weights.tolist() == [0, 0, 0, 2.5, 2.5, 0.5, 0.5]
    assert encoded.weights.dtype == "float32"
    last_is_empty = encode(ByteTokenizer(), "a", (Span(1, 4.0), Span(0, 1.0)))
    assert last_is_empty.weights is not None
    assert last_is_empty.weights.tolist() == [0, 4, 1]


def test_encode_no_token_reaches_across_the_end_of_a_part(tmp_path):
    train_sentencepiece(iter(["the answer is yes. " * 100]), 290, tmp_path / "a.model")
    tokenizer = load_tokenizer("sentencepiece", tmp_path / "a.model")
    whole = encode(tokenizer, "the answer is")
    parts = encode(tokenizer, "the answer is", (Span(6, 1.0), Span(7, 2.0)))
    assert len(parts.tokens) > len(whole.tokens)
    assert parts.weights is not None
    first = parts.tokens[parts.weights == 1]
    second = parts.tokens[parts.weights == 2][:-1]
    assert (tokenizer.decode(first), tokenizer.decode(second)) == ("the an", "swer is")


def test_encode_draw_is_that_of_other_versions():
    # A store made again must hold out the same documents: this number must never change.
    # sha256 of "abc" begins with ba7816bf8f01.
    assert encode(ByteTokenizer(), "abc").draw == pytest.approx(0xBA7816BF8F01 / 2**48, abs=1e-15)
