"""Reads the end of a file that may be large and still growing."""

from collections.abc import Iterator
from pathlib import Path

_BLOCK = 1 << 20


def lines_backwards(path: Path, at_most: int) -> Iterator[bytes]:
    """Yields the lines of the last `at_most` bytes, newest first, without a cut-off first line."""
    with open(path, "rb") as file:
        end = file.seek(0, 2)
        stop = max(end - at_most, 0)
        rest = b""
        while end > stop:
            begin = max(end - _BLOCK, stop)
            file.seek(begin)
            rest, *lines = (file.read(end - begin) + rest).split(b"\n")
            yield from reversed(lines)
            end = begin
    if not stop:
        yield rest
