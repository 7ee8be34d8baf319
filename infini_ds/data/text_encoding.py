"""Decodes text by its byte order mark, in any Unicode encoding; without one it is UTF-8."""

import codecs
import io
import re
from pathlib import Path
from typing import BinaryIO

_BLOCK_BYTES = 1 << 20
# Longer marks come first, because that of UTF-32-LE begins with that of UTF-16-LE.
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32LE"),
    (codecs.BOM_UTF32_BE, "UTF-32BE"),
    (codecs.BOM_UTF8, "UTF-8"),
    (codecs.BOM_UTF16_LE, "UTF-16LE"),
    (codecs.BOM_UTF16_BE, "UTF-16BE"),
)
# This many bytes are examined for UTF-16 and UTF-32 without a mark.
_HEAD_BYTES = 1024
# Fewer places that are not UTF-8 mean damage rather than another encoding.
_DAMAGED = 3
_LIKELY = 0.85


class WrongEncoding(ValueError):
    """A file is not in the expected encoding; the message says where, and how to convert it."""


class Utf8(io.RawIOBase):
    """Another stream's content as UTF-8 without a byte order mark.

    Half a surrogate pair in UTF-16 becomes bytes that are not valid UTF-8, so that the reader finds
    the damage in its place, just as in a damaged file of UTF-8.
    """

    def __init__(self, content: BinaryIO):
        self._content = content
        self._decoder: codecs.IncrementalDecoder | None = None
        self._encoding = ""
        self._waiting: memoryview | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        """See io.RawIOBase.

        Raises:
            WrongEncoding: the text looks as if it had another encoding than the one assumed.
        """
        if self._waiting is None:
            self._waiting = memoryview(self._first())
        while not self._waiting:
            block = self._content.read(_BLOCK_BYTES)
            self._waiting = memoryview(self._as_utf8(block))
            if not block:
                break
        size = min(len(buffer), len(self._waiting))
        buffer[:size] = self._waiting[:size]
        self._waiting = self._waiting[size:]
        return size

    def _first(self) -> bytes:
        block = self._content.read(_BLOCK_BYTES)
        for mark, encoding in _MARKS:
            if block.startswith(mark):
                block = block[len(mark) :]
                if encoding != "UTF-8":
                    self._encoding = encoding
                    self._decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
                break
        else:
            _check_is_utf8(block)
        return self._as_utf8(block)

    def _as_utf8(self, block: bytes) -> bytes:
        if self._decoder is None:
            return block
        try:
            text = self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise WrongEncoding(
                f"begins as {self._encoding}, but is not valid to its end: {error.reason}"
            ) from None
        return text.encode("utf-8", "surrogatepass")


def read_text(path: str | Path) -> str:
    """Reads the text of a small file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not text (WrongEncoding, UnicodeDecodeError).
    """
    with open(path, "rb") as file:
        return Utf8(file).readall().decode()


def conversion(text: bytes, first: int) -> str:
    """Explains for messages how to convert bytes to UTF-8 that are invalid from `first` on."""
    return (
        f"0x{text[first]:02x} is not UTF-8; convert it, from Windows-1252 for example with "
        "`iconv -f WINDOWS-1252 -t UTF-8`"
    )


def _check_is_utf8(block: bytes) -> None:
    """Raises WrongEncoding if the beginning of a file is text of another encoding."""
    encoding = _without_mark(block[:_HEAD_BYTES])
    if encoding:
        raise WrongEncoding(
            f"looks like {encoding} without a byte order mark; convert it with "
            f"`iconv -f {encoding} -t UTF-8`"
        )
    try:
        block.decode()
    except UnicodeDecodeError as error:
        beyond = len(re.findall(rb"[\x80-\xff]", block))
        wrong = len(re.findall("[\udc80-\udcff]", block.decode(errors="surrogateescape")))
        if wrong >= _DAMAGED and 2 * wrong > beyond:  # few multi-byte characters are valid
            line = block.count(b"\n", 0, error.start) + 1
            raise WrongEncoding(
                f"line {line:,}, byte {error.start:,}: {conversion(block, error.start)}"
            ) from None


def _without_mark(head: bytes) -> str:
    """Returns the likely UTF-16 or UTF-32 variant of bytes without a mark; empty for UTF-8."""
    controls = len(re.findall(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]", head))
    if 4 * controls < len(head) and (b"\0" not in head or _is_utf8(head)):
        return ""
    whole = head[: len(head) // 4 * 4]
    likely = {
        encoding: _likeness(whole.decode(encoding, "replace"))
        for encoding in ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE")
    }
    best = max(likely, key=lambda encoding: likely[encoding])
    return best if likely[best] > _LIKELY else ""


def _is_utf8(head: bytes) -> bool:
    """Tells whether the bytes are UTF-8, ignoring a character cut at the end."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def _likeness(text: str) -> float:
    """Rates from 0 to 1 how much text resembles writing. Swapped bytes mostly look Chinese."""
    letters = len(re.findall("[\t\n\r -~\xa0-\u06ff\u2010-\u2026]", text))  # Latin to Arabic
    wide = len(
        re.findall("[\u0900-\u0dff\u3000-\u30ff\u4e00-\u9fff\uac00-\ud7a3\uff00-\uffee]", text)
    )
    return (letters + 0.9 * wide) / max(len(text), 1)
