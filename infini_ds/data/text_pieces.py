"""A text file of any length, piece by piece."""

import codecs
from collections.abc import Iterator
from pathlib import Path

from infini_ds.data.text_encoding import conversion
from infini_ds.data.text_files import UNREADABLE, open_text, reason_of, size_of
from infini_ds.errors import UserError

_PIECE_BYTES = 1 << 16


class TextPieces:
    """The text of one file (see `open_text`), without ever holding more than a piece.

    Pieces end at line ends, where a token seldom reaches across, so that encoding them one by one
    gives the tokens of the whole text but for a few at their ends (with plain bytes: all). Only a
    line of more than 64 KiB is cut elsewhere, between two characters.

    Attributes:
        total_bytes: size of the file on disk; 0 of a pipe.
        done_bytes: how much of that has been read.
    """

    def __init__(self, path: str | Path):
        self._path = path
        self.done_bytes = 0
        try:
            self.total_bytes = size_of(path)
        except OSError as error:
            raise self._unreadable(reason_of(error)) from None

    def __iter__(self) -> Iterator[str]:
        """The pieces, none of them empty.

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
            # What was left of the block before comes first.
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
