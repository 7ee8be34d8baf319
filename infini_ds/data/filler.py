"""Makes the filler in which documents hide what they ask for: sentences, letters or real text."""

import math
from functools import cached_property

import numpy as np

from infini_ds.config import DataConfig, FillerKind
from infini_ds.data.documents import Corpus
from infini_ds.errors import UserError

STANDARD = (
    b"The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)
"""The filler of Mohtashami & Jaggi (2023), arXiv 2305.16300."""
# Six of the 32 characters are spaces, which makes words of about four letters.
_NOISE = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz      ", dtype=np.uint8)
# At most this much text is kept to cut filler from.
_TEXT_BYTES = 64 << 20


class Filler:
    """Cuts filler of any length, all of it ASCII.

    Args:
        kind: as data.passkey.filler.
        text_files: as data.passkey.text_files.
        section: path of the config's section with these settings, for messages.

    Raises:
        UserError: text_files are unusable.
    """

    def __init__(self, kind: FillerKind, text_files: list[str], section: str):
        self._cut = {"standard": _standard, "noise": _noise, "text": self._cut_text}[kind]
        self._setting = f"{section}.text_files"
        self._corpus = _text_corpus(text_files, self._setting) if kind == "text" else None

    @property
    def snapshot(self) -> str:
        """A checksum that changes when text_files do."""
        return self._corpus.snapshot if self._corpus else ""

    def cut(self, random: np.random.Philox, length: int) -> bytes:
        """Returns `length` bytes of filler.

        Raises:
            UserError: text_files have no text.
        """
        return self._cut(random, length)

    def _cut_text(self, random: np.random.Philox, length: int) -> bytes:
        """Cuts out text from the beginning of a random line."""
        text = self._text
        begin = text.find(b"\n", int(random.random_raw()) % len(text)) + 1
        return _cyclic(text, begin, length)

    @cached_property
    def _text(self) -> bytes:
        """The corpus's text without characters beyond ASCII, so that it can be cut anywhere."""
        assert self._corpus
        parts, size = [], 0
        for document in self._corpus:
            parts.append(document.text.encode("ascii", "ignore"))
            size += len(parts[-1])
            if size >= _TEXT_BYTES:
                break
        text = b"\n".join(parts)
        if not text:
            raise UserError(f"{self._setting}: have no text; name others")
        return text


def _standard(random: np.random.Philox, length: int) -> bytes:
    return _cyclic(STANDARD, int(random.random_raw()) % len(STANDARD), length)


def _noise(random: np.random.Philox, length: int) -> bytes:
    raw = np.asarray(random.random_raw(-(-length // 8)), dtype="<u8").view(np.uint8)
    return _NOISE[raw[:length] % len(_NOISE)].tobytes()


def _cyclic(text: bytes, begin: int, length: int) -> bytes:
    """Returns `length` bytes of an endlessly repeated text, starting at `begin`."""
    first = text[begin : begin + length]
    return (first + text * math.ceil((length - len(first)) / len(text)))[:length]


def _text_corpus(text_files: list[str], setting: str) -> Corpus:
    if not text_files:
        return Corpus(DataConfig(store=""))
    try:
        return Corpus(DataConfig(source="files", files=text_files, store=""))
    except UserError as error:
        raise UserError(str(error).replace("data.files", setting, 1)) from None
