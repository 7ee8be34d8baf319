"""No part of a character is ever printed, and nothing of what ends the text."""

import pytest

from infini_ds.data.sentencepiece_tokenizer import SentencePieceTokenizer, train_sentencepiece
from infini_ds.data.tokenizer_base import ByteTokenizer
from infini_ds.generation.text import text_of

BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> SentencePieceTokenizer:
    """A tokenizer that knows no character outside of ASCII."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece(iter(["the grass is green and the sky is blue"] * 20), 290, path)
    return SentencePieceTokenizer(path.read_bytes(), "made here")


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_characters_of_several_tokens_come_whole(pieces, kind):
    tokenizer = pieces if kind == "sentencepiece" else BYTES
    text = "the sky é is € blue 🌌."
    tokens = tokenizer.encode(text)
    assert len(tokens) > len(text) - 15
    read = []

    def told():
        for token in tokens:
            read.append(token)
            yield token

    for part in text_of(tokenizer, told()):
        assert "\ufffd" not in part
        assert tokenizer.decode(read).endswith(part)  # at once, as soon as it is whole
    assert "".join(text_of(tokenizer, tokens)) == text


def test_broken_characters_are_replaced_once_they_are_known_to_be():
    assert list(text_of(BYTES, [0xC3, 65, 0xE2, 0x82])) == ["\ufffdA", "\ufffd"]


def test_ids_beyond_the_tokenizer_stand_for_nothing():
    assert "".join(text_of(BYTES, [65, 256, 257, 9999, 66])) == "AB"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one. two.", ". t", ["o", "n", "e"]),
        ("aaab", "aab", ["a"]),
        ("a.b.", ".!", ["a", ".b", "."]),
        ("stop", "stop", []),
    ],
)
def test_ends_before_the_stop_and_holds_back_its_beginning(text, stop, expected):
    assert list(filter(None, text_of(BYTES, BYTES.encode(text), stop))) == expected
