"""Text to token ids and back: plain bytes, sentencepiece with byte fallback, or tokenizer.json."""

import hashlib
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from infini_ds.config import TOKENIZER_FILES
from infini_ds.data.generation_settings import read_generation, save_generation
from infini_ds.errors import UserError
from infini_ds.system.causes import one_line

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


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model.

    Lossless for models as `train_sentencepiece` makes them. A model from elsewhere may normalise
    text or put a space before it; then `token_bytes` counts what it makes of it.
    """

    def __init__(self, model: bytes, name: str):
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(model)
        except RuntimeError:
            raise UserError(f"data.tokenizer.model {name}: not a sentencepiece model") from None
        for token, i in (("BOS", processor.bos_id()), ("EOS", processor.eos_id())):
            if i < 0:
                raise UserError(f"data.tokenizer.model {name}: must have a {token} id, has none")
        self._processor, self._content = processor, model
        tokens = range(processor.GetPieceSize())
        bytes_ = {self._bytes_of(i)[0]: i for i in tokens if processor.IsByte(i)}
        self._exact = Exact(processor.EncodeAsIds, bytes_)
        super().__init__(
            [self._bytes_of(i) for i in tokens],
            processor.bos_id(),
            processor.eos_id(),
            hashlib.sha256(model).hexdigest(),
        )

    def save(self, directory: Path) -> None:
        """See Tokenizer."""
        super().save(directory)
        (directory / TOKENIZER_FILES["sentencepiece"]).write_bytes(self._content)

    def _bytes_of(self, i: int) -> bytes:
        if self._processor.IsControl(i) or self._processor.IsUnknown(i):
            return b""
        piece = self._processor.IdToPiece(i)
        if self._processor.IsByte(i):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE_MARK, " ").encode()

    def _encode_piece(self, text: str, begins: bool) -> list[int]:
        return self._exact.encode(text, begins)


def load_tokenizer(kind: str, model: str | Path = "") -> Tokenizer:
    """The tokenizer of a kind of data.tokenizer, from its model file unless it is `bytes`.

    Raises:
        UserError: the model is missing or unusable.
    """
    if kind == "bytes":
        return ByteTokenizer()
    try:
        if kind == "tokenizers":
            from infini_ds.data.tokenizer_json import TokenizerJson

            tokenizer = TokenizerJson(Path(model))
        else:
            tokenizer = SentencePieceTokenizer(Path(model).read_bytes(), str(model))
    except OSError as error:
        raise UserError(
            f"data.tokenizer.model {model}: cannot be read ({error.strerror})"
        ) from None
    tokenizer.generation = read_generation(Path(model).parent)
    return tokenizer


def train_sentencepiece(texts: Iterator[str], vocab_size: int, destination: str | Path) -> None:
    """Trains a lossless sentencepiece model and writes it to `destination`.

    Text is taken as it is: whitespace is kept, runs of spaces may become one piece, a line's end
    may join what stands before it, and characters without a piece fall back to bytes.

    Raises:
        UserError: the vocabulary does not fit the text.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            # The trainer cannot take NUL; it is encoded by byte fallback.
            sentence_iterator=(text.replace("\0", "") for text in texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            max_sentence_length=1 << 30,
            # The model records this number, so a machine's own number would change the fingerprint.
            num_threads=4,
            minloglevel=3,
        )
    except (RuntimeError, ValueError) as error:  # the latter of a number beyond 32 bits
        raise UserError(_explain(str(error), vocab_size)) from None
    Path(destination).write_bytes(model.getvalue())


def _explain(message: str, vocab_size: int) -> str:
    setting = f"data.tokenizer.vocab_size ({vocab_size})"
    if found := re.search(r"too high .*<= (\d+)", message):
        return f"{setting} is more than this corpus can fill: must be at most {found[1]}"
    if found := re.search(r"required_chars\D*\d+ vs (\d+)", message):
        return f"{setting} is too small for the characters of this corpus: must be over {found[1]}"
    return f"{setting}: no tokenizer can be trained on this corpus ({one_line(message)})"
