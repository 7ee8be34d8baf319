"""Loads a tokenizer of any kind from its file."""

from pathlib import Path

from infini_ds.config import TokenizerConfig
from infini_ds.data.chat_template import read_chat_template, read_template
from infini_ds.data.generation_settings import read_generation
from infini_ds.data.tokenizer_base import ByteTokenizer, Tokenizer
from infini_ds.errors import UserError


def configured_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Loads the tokenizer that a config names, with the chat template that it names.

    Raises:
        UserError: the model or the template cannot be read.
    """
    tokenizer = load_tokenizer(config.kind, config.model)
    if config.chat_template:
        setting = "data.tokenizer.chat_template"
        tokenizer.chat_template = read_template(config.chat_template, setting)
        if not tokenizer.chat_template.strip():
            raise UserError(f"{setting} {config.chat_template}: is empty; it must be a template")
    return tokenizer


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
    tokenizer.chat_template = read_chat_template(Path(model).parent)
    return tokenizer
