"""Reads and trains sentencepiece models with byte fallback."""

import hashlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from infini_ds.config import TOKENIZER_FILES
from infini_ds.data.tokenizer_base import SPACE_MARK, Exact, Tokenizer
from infini_ds.errors import UserError
from infini_ds.system.causes import one_line


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model.

    Models made by `train_sentencepiece` are lossless. A model from elsewhere may normalise text or
    put a space before it; `token_bytes` then counts the changed text.
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

    @property
    def special_tokens(self) -> dict[str, int]:
        """See Tokenizer."""
        return {self._processor.IdToPiece(i): i for i in (self.bos_id, self.eos_id)}

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


def train_sentencepiece(texts: Iterator[str], vocab_size: int, destination: str | Path) -> None:
    """Trains a lossless sentencepiece model and writes it to `destination`.

    Text is taken as it is: whitespace is kept, runs of spaces may become one piece, a line end may
    join the characters before it, and characters without a piece fall back to bytes.

    Raises:
        UserError: the vocabulary does not suit the text.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            # The trainer cannot take NUL, which byte fallback encodes.
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
            # The model records this number, so it must be the same on every machine.
            num_threads=4,
            minloglevel=3,
        )
    except (RuntimeError, ValueError) as error:  # ValueError: a number beyond 32 bits
        raise UserError(_explain(str(error), vocab_size)) from None
    Path(destination).write_bytes(model.getvalue())


def _explain(message: str, vocab_size: int) -> str:
    setting = f"data.tokenizer.vocab_size ({vocab_size})"
    if found := re.search(r"too high .*<= (\d+)", message):
        return f"{setting} is more than this corpus can fill: must be at most {found[1]}"
    if found := re.search(r"required_chars\D*\d+ vs (\d+)", message):
        return f"{setting} is too small for the characters of this corpus: must be over {found[1]}"
    return f"{setting}: no tokenizer can be trained on this corpus ({one_line(message)})"
