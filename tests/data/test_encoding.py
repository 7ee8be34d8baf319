import pytest

from infini_ds.data.encoding import encode
from infini_ds.data.tokenizer import ByteTokenizer


def test_encode_stores_bos_tokens_and_eos():
    encoded = encode(ByteTokenizer(), "é!")
    assert encoded.tokens.tolist() == [256, 0xC3, 0xA9, 0x21, 257]
    assert encoded.tokens.dtype == "uint16"
    assert encoded.text_bytes == 3


def test_encode_draw_is_that_of_other_versions():
    # A store made again must hold out the same documents: this number must never change.
    # sha256 of "abc" begins with ba7816bf8f01.
    assert encode(ByteTokenizer(), "abc").draw == pytest.approx(0xBA7816BF8F01 / 2**48, abs=1e-15)
