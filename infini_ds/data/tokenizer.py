"""Text to token ids and back: what all tokenizers have in common, and plain bytes."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from infini_ds.data.generation_settings import save_generation

# Sentencepiece writes a space as this character, so that in a text it would come back as a space.
SPACE_MARK = "\u2581"
# No characters of any script, of as many bytes as the mark: one that no text has stands in for it.
_STAND_INS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
# A text is encoded in pieces of about this many characters, so that a book needs no more working
# memory than a page.
PIECE_CHARACTERS = 1 << 18
_IDS_AT_ONCE = 1 << 20


class Tokenizer:
    """Token ids of texts. BOS and EOS are ids of their own that no text is encoded to.

    Args:
        table: the bytes each id stands for; empty for BOS, EOS and unknown.
    """

    generation: dict[str, Any] = {}  # noqa: RUF012, replaced whole
    """Of the model that it came with, see `read_generation`."""

    def __init__(self, table: list[bytes], bos_id: int, eos_id: int, fingerprint: str):
        self.table = table
        self.vocab_size = len(table)
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.fingerprint = fingerprint
        self.token_bytes = np.array([len(entry) for entry in table], dtype=np.int32)
        """[vocab_size] int32: bytes of text each id stands for."""
        self._joined = np.frombuffer(b"".join(table), np.uint8)
        self._begins = np.cumsum(self.token_bytes) - self.token_bytes

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS and EOS."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str, begins: bool = True) -> np.ndarray:
        """Ids of a text, without BOS and EOS: uint32 [tokens].

        Args:
            begins: False where the text goes on with another, so that no space is put before it.
        """
        pieces = [
            np.array(self._encode_piece(piece, begins and not number), dtype=np.uint32)
            for number, piece in enumerate(self._pieces(text))
        ]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.uint32)

    def save(self, directory: Path) -> None:
        """Writes the files of which `load_tokenizer` makes it again, if it needs any."""
        save_generation(self.generation, directory)

    @property
    def eos_ids(self) -> list[int]:
        """Tokens at which a text that is written ends: EOS, which ends documents, comes first."""
        ends = self.generation.get("eos_token_id") or ()
        return [self.eos_id, *(i for i in ends if i != self.eos_id)]

    def _pieces(self, text: str) -> Iterator[str]:
        for i in range(0, len(text), PIECE_CHARACTERS):
            yield text[i : i + PIECE_CHARACTERS]

    def _encode_piece(self, text: str, begins: bool) -> list[int]:
        raise NotImplementedError

    def bytes_of(self, ids: np.ndarray) -> bytes:
        """What ids [any length] stand for, as `decode` has it before it becomes text."""
        parts = []
        for first in range(0, len(ids), _IDS_AT_ONCE):
            some = ids[first : first + _IDS_AT_ONCE]
            sizes = self.token_bytes[some]
            places = np.repeat(self._begins[some] - np.cumsum(sizes) + sizes, sizes)
            parts.append(self._joined[places + np.arange(len(places))].tobytes())
        return b"".join(parts)

    def decode(self, ids) -> str:
        """Text of ids. BOS, EOS and unknown stand for nothing; broken UTF-8 is replaced."""
        table = self.table
        return b"".join([table[i] for i in ids]).decode("utf-8", errors="replace")


class Exact:
    """Keeps a tokenizer that writes spaces as marks from changing what it need not.

    A space mark in a text comes back as one: another character goes in, and its bytes become the
    mark's. Where a space is put before a text, none is put before one that goes on with another:
    that character goes in first, and is taken out with what comes before it. Without tokens of
    single bytes all is as the tokenizer has it.

    Args:
        encode: ids of a text.
        ids: of the tokens that stand for single bytes, by byte.
    """

    def __init__(self, encode: Callable[[str], list[int]], ids: dict[int, int]):
        self._encode = encode
        self._mark = [ids.get(byte, -1) for byte in SPACE_MARK.encode()]
        self._stand_ins: dict[str, list[int]] = {}
        before = 0
        for character in _STAND_INS if -1 not in self._mark else ():
            own = [ids.get(byte, -1) for byte in character.encode()]
            found = encode(character)
            if found[-len(own) :] == own:
                self._stand_ins[character] = own
                before = len(found) - len(own)
        self._puts_before = before > 0

    def encode(self, text: str, begins: bool) -> list[int]:
        """Ids of a text, see `Tokenizer.encode_array`."""
        goes_on = self._puts_before and not begins
        if not goes_on and SPACE_MARK not in text:
            return self._encode(text)
        character = next((c for c in self._stand_ins if c not in text), "")
        if not character:
            return self._encode(text)
        ids = self._encode(character * goes_on + text.replace(SPACE_MARK, character))
        places = _places(ids, self._stand_ins[character])
        for place in places:
            ids[place : place + len(self._mark)] = self._mark
        return ids[places[0] + len(self._mark) :] if goes_on else ids


def _places(ids: list[int], part: list[int]) -> list[int]:
    """Where a part of ids begins."""
    starts = [i for i, token in enumerate(ids) if token == part[0]]
    return [i for i in starts if ids[i : i + len(part)] == part]


class ByteTokenizer(Tokenizer):
    """A byte's id is its value; BOS is 256 and EOS 257."""

    def __init__(self):
        table = [bytes([value]) for value in range(256)] + [b"", b""]
        super().__init__(table, 256, 257, hashlib.sha256(b"bytes").hexdigest())

    def _encode_piece(self, text: str, begins: bool) -> list[int]:
        return list(text.encode())

    def bytes_of(self, ids: np.ndarray) -> bytes:
        """See Tokenizer."""
        return ids[ids < 256].astype(np.uint8).tobytes()
