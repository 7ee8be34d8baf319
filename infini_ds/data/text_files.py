"""Opens text files as people have them: plain, .gz or .zst, in any Unicode encoding, or a pipe."""

import contextlib
import gzip
import io
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import zstandard

from infini_ds.data.text_encoding import Utf8, WrongEncoding
from infini_ds.system.causes import one_line

STANDARD_INPUT = "-"
# Errors that reading a text file may raise.
UNREADABLE = (EOFError, OSError, WrongEncoding, zlib.error, zstandard.ZstdError)
_READ_BYTES = 1 << 20
_MAGIC = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}


class _Source(io.FileIO):
    """A file as it is on disk, before decompression."""

    done_bytes = 0
    """Number of bytes read so far."""

    def readinto(self, buffer) -> int | None:
        count = super().readinto(buffer)
        self.done_bytes += count or 0
        return count


@contextlib.contextmanager
def open_text(path: str | Path) -> Iterator[tuple[IO[bytes], _Source]]:
    """Streams a file's text as UTF-8, and yields the file itself beside it.

    Raises:
        UNREADABLE: the file cannot be opened, or not read further.
    """
    file = _file(path)
    with (
        _Source(file, closefd=file != 0) as source,
        io.BufferedReader(source) as raw,
        _decompressed(raw, compression(path) or _compression_of(raw)) as content,
        io.BufferedReader(Utf8(content), _READ_BYTES) as text,
    ):
        yield text, source


def exists(path: str | Path) -> bool:
    """Tells whether there is something to read: a file, a pipe, or `-` for standard input."""
    return os.path.exists(_file(path)) and not os.path.isdir(_file(path))


def is_pipe(path: str | Path) -> bool:
    """Tells whether the path can be read only once and has no size."""
    return str(path) == STANDARD_INPUT or not stat.S_ISREG(os.stat(path).st_mode)


def size_of(path: str | Path) -> int:
    """Returns the size on disk in bytes; 0 for a pipe."""
    return 0 if is_pipe(path) else os.stat(path).st_size


def compression(path: str | Path) -> str:
    """Returns the compression that the name implies: `.gz`, `.zst` or an empty string."""
    suffix = Path(path).suffix.lower()
    return suffix if suffix in (".gz", ".zst") else ""


def reason_of(error: BaseException) -> str:
    """Explains in one line why a file cannot be read."""
    strerror = getattr(error, "strerror", None)
    return strerror or one_line(error)


def _file(path: str | Path) -> str | Path | int:
    return 0 if str(path) == STANDARD_INPUT else path


def _compression_of(raw: Any) -> str:
    """Detects compression by the first bytes, which no text has; a pipe's name does not tell it."""
    head = raw.peek(4)
    return next((suffix for suffix, magic in _MAGIC.items() if head.startswith(magic)), "")


def _decompressed(raw: Any, kind: str) -> Any:
    if kind == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if kind == ".zst":
        return io.BufferedReader(_ZstdReader(raw), _READ_BYTES)
    return raw


class _ZstdReader(io.RawIOBase):
    """Reads zstd frames as one stream and, unlike zstandard's own reader, notices truncation."""

    def __init__(self, raw: IO[bytes]):
        self._raw = raw
        self._frame = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._output:
            self._input = self._input or self._raw.read(_READ_BYTES)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the compressed file ended before its end marker")
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._output = memoryview(self._frame.decompress(self._input))
            self._input = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size
