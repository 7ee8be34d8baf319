"""Reads a text file of any length piece by piece."""

import codecs
from collections.abc import Iterator
from pathlib import Path

from infini_ds.data.text_encoding import conversion
from infini_ds.data.text_files import UNREADABLE, open_text, reason_of, size_of
from infini_ds.errors import UserError

_PIECE_BYTES = 1 << 16


class TextPieces:
    """The text of one file (see `open_text`), of which never more than a piece is held in memory.

    Pieces end at line ends, which tokens seldom cross. Encoding the pieces one by one therefore
    gives the tokens of the whole text, except for a few where pieces meet (none with plain bytes).
    Only a line of more than 64 KiB is cut elsewhere, between two characters.

    Attributes:
        total_bytes: size of the file on disk; 0 for a pipe.
        done_bytes: number of those bytes read so far.
    """

    def __init__(self, path: str | Path):
        self._path = path
        self.done_bytes = 0
        try:
            self.total_bytes = size_of(path)
        except OSError as error:
            raise self._unreadable(reason_of(error)) from None

    def __iter__(self) -> Iterator[str]:
        """Yields the pieces, none of them empty.

        Raises:
            UserError: the file cannot be read, or is not text.
        """
        decoder = codecs.getincrementaldecoder("utf-8")()
        text, read, lines, block = "", 0, 1, b""
        try:
            with open_text(self._path) as (content, source):
                while block := content.read(_PIECE_BYTES):
                    self.done_bytes = source.done_bytes
                    text += decoder.decode(block)
                    read += len(block)
                    lines += block.count(b"\n")
                    end = text.rfind("\n") + 1 or (len(text) if len(text) > _PIECE_BYTES else 0)
                    if end:
                        yield text[:end]
                        text = text[end:]
            text += decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            wrong = error.object
            # The invalid bytes begin with those left over from the block before.
            place = read - (len(wrong) - len(block)) + error.start
            lines += wrong.count(b"\n", 0, error.start)
            raise self._unreadable(
                f"line {lines:,}, byte {place:,}: {conversion(wrong, error.start)}"
            ) from None
        except UNREADABLE as error:
            raise self._unreadable(reason_of(error)) from None
        if text:
            yield text

    def _unreadable(self, reason: str) -> UserError:
        return UserError(f"document {self._path}: cannot be read ({reason})")
