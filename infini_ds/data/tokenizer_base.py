"""Converts text to token ids and back: the base of all tokenizers, and plain bytes."""

import hashlib
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from infini_ds.data.chat_template import save_chat_template
from infini_ds.data.generation_settings import save_generation

# Sentencepiece writes a space as this character, so one in the text would come back as a space.
SPACE_MARK = "\u2581"
# Noncharacters with as many bytes as the mark; one that is absent from a text stands in for it.
_STAND_INS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
# A text is encoded in pieces of about this many characters, so that a book needs no more working
# memory than a page.
PIECE_CHARACTERS = 1 << 18
_IDS_AT_ONCE = 1 << 20


class Tokenizer:
    """Converts between text and token ids. Only `encode_rendered` gives ids of BOS and EOS.

    Args:
        table: the bytes that each id stands for; empty for BOS, EOS and unknown.
    """

    generation: dict[str, Any] = {}  # noqa: RUF012, replaced whole
    """Generation settings of the model it came with, see `read_generation`."""
    chat_template: str = ""
    """Chat template of the model it came with, see `read_chat_template`."""

    def __init__(self, table: list[bytes], bos_id: int, eos_id: int, fingerprint: str):
        self.table = table
        self.vocab_size = len(table)
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.fingerprint = fingerprint
        self.token_bytes = np.array([len(entry) for entry in table], dtype=np.int32)
        """[vocab_size] int32: bytes of text that each id stands for."""
        self._joined = np.frombuffer(b"".join(table), np.uint8)
        self._begins = np.cumsum(self.token_bytes) - self.token_bytes

    def encode(self, text: str) -> list[int]:
        """Encodes a text, without BOS and EOS."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str, begins: bool = True) -> np.ndarray:
        """Encodes a text, without BOS and EOS: uint32 [tokens].

        Args:
            begins: False if the text continues another one, so that no space is put before it.
        """
        pieces = [
            np.array(self._encode_piece(piece, begins and not number), dtype=np.uint32)
            for number, piece in enumerate(self._pieces(text))
        ]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.uint32)

    def encode_rendered(self, text: str, ends: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Encodes what a chat template has written: its special tokens are tokens, not text.

        Args:
            ends: where parts of the text end, in characters. Tokenizers that do not tell the
                characters of their tokens let none cross an end.

        Returns:
            ids, uint32 [tokens], and the characters in which each lies, int64 [tokens, 2]: the
            first, and the one after the last.
        """
        names = sorted(self.special_tokens, key=len, reverse=True)
        found = list(re.finditer("|".join(map(re.escape, names)), text))
        cuts = {0, *ends, len(text)}.union(*(match.span() for match in found))
        ids, places, begins = [np.empty(0, np.uint32)], [np.empty((0, 2), np.int64)], True
        for begin, end in itertools.pairwise(sorted(cuts)):
            special = self.special_tokens.get(text[begin:end])
            if special is None:
                ids.append(self.encode_array(text[begin:end], begins))
                begins = False
            else:
                ids.append(np.array([special], np.uint32))
            places.append(np.tile(np.array([begin, end]), (len(ids[-1]), 1)))
        return np.concatenate(ids), np.concatenate(places)

    @property
    def special_tokens(self) -> dict[str, int]:
        """Ids by what a chat template writes for them; BOS and EOS are among them."""
        return {"<s>": self.bos_id, "</s>": self.eos_id}

    @property
    def template_names(self) -> dict[str, str]:
        """Special tokens by the names that chat templates have for them, such as `bos_token`."""
        texts = {i: text for text, i in self.special_tokens.items()}
        return {"bos_token": texts[self.bos_id], "eos_token": texts[self.eos_id]}

    def save(self, directory: Path) -> None:
        """Writes the files from which `load_tokenizer` restores this tokenizer, if it needs any."""
        save_generation(self.generation, directory)
        save_chat_template(self.chat_template, directory)

    @property
    def eos_ids(self) -> list[int]:
        """Tokens that end a generated text; the first is EOS, which ends documents."""
        ends = self.generation.get("eos_token_id") or ()
        return [self.eos_id, *(i for i in ends if i != self.eos_id)]

    def _pieces(self, text: str) -> Iterator[str]:
        for i in range(0, len(text), PIECE_CHARACTERS):
            yield text[i : i + PIECE_CHARACTERS]

    def _encode_piece(self, text: str, begins: bool) -> list[int]:
        raise NotImplementedError

    def bytes_of(self, ids: np.ndarray) -> bytes:
        """Returns the bytes that ids [any length] stand for, before `decode` makes them text."""
        parts = []
        for first in range(0, len(ids), _IDS_AT_ONCE):
            some = ids[first : first + _IDS_AT_ONCE]
            sizes = self.token_bytes[some]
            places = np.repeat(self._begins[some] - np.cumsum(sizes) + sizes, sizes)
            parts.append(self._joined[places + np.arange(len(places))].tobytes())
        return b"".join(parts)

    def decode(self, ids) -> str:
        """Decodes ids. BOS, EOS and unknown stand for nothing; invalid UTF-8 is replaced."""
        table = self.table
        return b"".join([table[i] for i in ids]).decode("utf-8", errors="replace")


class Exact:
    """Keeps a tokenizer that writes spaces as marks from changing text needlessly.

    A space mark in a text survives: a stand-in character is encoded, and its bytes are replaced by
    the mark's. If the tokenizer puts a space before a text, none is put before a text that
    continues another one: the stand-in is put in front, and then removed with everything before
    it. Without tokens for single bytes, the tokenizer's output is left as it is.

    Args:
        encode: returns the ids of a text.
        ids: maps each byte to the token that stands for it alone.
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
        """Encodes a text, see `Tokenizer.encode_array`."""
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
    """Returns the indices at which `part` begins in `ids`."""
    starts = [i for i, token in enumerate(ids) if token == part[0]]
    return [i for i in starts if ids[i : i + len(part)] == part]


class ByteTokenizer(Tokenizer):
    """Encodes each byte as its value; BOS is 256 and EOS is 257."""

    def __init__(self):
        table = [bytes([value]) for value in range(256)] + [b"", b""]
        super().__init__(table, 256, 257, hashlib.sha256(b"bytes").hexdigest())

    def _encode_piece(self, text: str, begins: bool) -> list[int]:
        return list(text.encode())

    def bytes_of(self, ids: np.ndarray) -> bytes:
        """See Tokenizer."""
        return ids[ids < 256].astype(np.uint8).tobytes()
