"""Text of any Unicode encoding, as it says by its byte order mark; without one it is UTF-8."""

import codecs
import io
import re
from pathlib import Path
from typing import BinaryIO

_BLOCK_BYTES = 1 << 20
# Longer marks first: that of UTF-32-LE begins with that of UTF-16-LE.
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32LE"),
    (codecs.BOM_UTF32_BE, "UTF-32BE"),
    (codecs.BOM_UTF8, "UTF-8"),
    (codecs.BOM_UTF16_LE, "UTF-16LE"),
    (codecs.BOM_UTF16_BE, "UTF-16BE"),
)
# Of UTF-16 and UTF-32 without a mark so many bytes are looked at.
_HEAD_BYTES = 1024
# Fewer places that are not UTF-8 are damage of a file rather than its encoding.
_DAMAGED = 3
_LIKELY = 0.85


class WrongEncoding(ValueError):
    """A file is not in the encoding that it must be in; says where, and how to convert it."""


class Utf8(io.RawIOBase):
    """What another stream has, as UTF-8 without a byte order mark.

    Half a surrogate pair in UTF-16 becomes bytes that are no UTF-8, as it is in a file of UTF-8:
    whoever reads them finds the damage where it is.
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
            WrongEncoding: it looks like another encoding than it is read in.
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
                f"begins as {self._encoding}, which it is not to its end: {error.reason}"
            ) from None
        return text.encode("utf-8", "surrogatepass")


def read_text(path: str | Path) -> str:
    """The text of a small file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not text (WrongEncoding, UnicodeDecodeError).
    """
    with open(path, "rb") as file:
        return Utf8(file).readall().decode()


def conversion(text: bytes, first: int) -> str:
    """How to make UTF-8 of bytes that are none from index `first` on, for messages."""
    return (
        f"0x{text[first]:02x} is not UTF-8; convert it, from Windows-1252 for example with "
        "`iconv -f WINDOWS-1252 -t UTF-8`"
    )


def _check_is_utf8(block: bytes) -> None:
    """Refuses the beginning of a file that is text of another encoding."""
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
        if wrong >= _DAMAGED and 2 * wrong > beyond:  # few characters of several bytes are right
            line = block.count(b"\n", 0, error.start) + 1
            raise WrongEncoding(
                f"line {line:,}, byte {error.start:,}: {conversion(block, error.start)}"
            ) from None


def _without_mark(head: bytes) -> str:
    """UTF-16 or UTF-32, where text of UTF-8 would be full of control characters but for that."""
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
    """But for the end, which may be cut."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def _likeness(text: str) -> float:
    """Of written language, from 0 to 1. What bytes in a wrong order look like is mostly Chinese."""
    letters = len(re.findall("[\t\n\r -~\xa0-\u06ff\u2010-\u2026]", text))  # Latin to Arabic
    wide = len(
        re.findall("[\u0900-\u0dff\u3000-\u30ff\u4e00-\u9fff\uac00-\ud7a3\uff00-\uffee]", text)
    )
    return (letters + 0.9 * wide) / max(len(text), 1)
