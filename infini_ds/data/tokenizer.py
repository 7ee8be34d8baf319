"""Loads a tokenizer of any kind from its file."""

from pathlib import Path

from infini_ds.data.generation_settings import read_generation
from infini_ds.data.tokenizer_base import ByteTokenizer, Tokenizer
from infini_ds.errors import UserError


def load_tokenizer(kind: str, model: str | Path = "") -> Tokenizer:
    """Loads a tokenizer of a kind of data.tokenizer; all kinds but `bytes` need a model file.

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
            from infini_ds.data.sentencepiece_tokenizer import SentencePieceTokenizer

            tokenizer = SentencePieceTokenizer(Path(model).read_bytes(), str(model))
    except OSError as error:
        raise UserError(
            f"data.tokenizer.model {model}: cannot be read ({error.strerror})"
        ) from None
    tokenizer.generation = read_generation(Path(model).parent)
    return tokenizer
