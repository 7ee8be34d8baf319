"""A text file of any length, piece by piece."""

import codecs
import zlib
from collections.abc import Iterator
from pathlib import Path

import zstandard

from infini_ds.data.documents import decompressed
from infini_ds.errors import UserError

_PIECE_BYTES = 1 << 16


class TextPieces:
    """The text of one UTF-8 file, plain, .gz or .zst, without ever holding more than a piece.

    Pieces end at line ends, where a token seldom reaches across, so that encoding them one by one
    gives the tokens of the whole text but for a few at their ends (with plain bytes: all). Only a
    line of more than 64 KiB is cut elsewhere, between two characters.

    Attributes:
        total_bytes: size of the file on disk.
        done_bytes: how much of that has been read.
    """

    def __init__(self, path: str | Path):
        self._path = Path(path)
        self.done_bytes = 0
        try:
            self.total_bytes = self._path.stat().st_size
        except OSError as error:
            raise self._unreadable(error.strerror or "") from None

    def __iter__(self) -> Iterator[str]:
        """The pieces, none of them empty.

        Raises:
            UserError: the file cannot be read, or is not UTF-8.
        """
        decoder = codecs.getincrementaldecoder("utf-8")()
        text, read = "", 0
        try:
            with self._path.open("rb") as raw, decompressed(raw, self._path) as content:
                while block := content.read(_PIECE_BYTES):
                    self.done_bytes = raw.tell()
                    text += decoder.decode(block)
                    read += len(block)
                    end = text.rfind("\n") + 1 or (len(text) if len(text) > _PIECE_BYTES else 0)
                    if end:
                        yield text[:end]
                        text = text[end:]
            text += decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            place = read - len(decoder.getstate()[0]) + error.start
            raise self._unreadable(f"not UTF-8 at byte {place:,}: {error.reason}") from None
        except (EOFError, OSError, zlib.error, zstandard.ZstdError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise self._unreadable(reason) from None
        if text:
            yield text

    def _unreadable(self, reason: str) -> UserError:
        return UserError(f"document {self._path}: cannot be read ({reason})")
