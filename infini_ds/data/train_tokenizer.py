"""Trains a tokenizer on text sampled from the whole corpus.

`python -m infini_ds.data.train_tokenizer MODEL VOCAB_SIZE FILES...` trains one alone, without
preparing a store.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from infini_ds.config import DataConfig, TokenizerConfig
from infini_ds.data.documents import Corpus, Document
from infini_ds.data.sentencepiece_tokenizer import train_sentencepiece
from infini_ds.data.tokenizer import load_tokenizer
from infini_ds.errors import UserError
from infini_ds.system.causes import one_line
from infini_ds.system.paths import argument

_BLOCK_CHARACTERS = 2048
# A network stream has to be read again to be tokenised, so it is sampled over only this many
# times the training text's length instead of to its end.
_STREAM_FACTOR = 50


def sample_text(documents: Iterable[Document], budget: int, read_limit: int = 0) -> list[str]:
    """Samples blocks of text at even distances over all documents, `budget` bytes at most.

    The size of the corpus need not be known: whenever the budget is full, every other block is
    dropped and the distance doubled, so at least half the budget is used if there is enough text.

    Args:
        read_limit: number of characters after which to stop; 0 reads all documents.
    """
    kept: list[str] = []
    kept_bytes = 0
    distance = 1
    number = 0
    for document in documents:
        text = document.text
        for begin in range(0, len(text), _BLOCK_CHARACTERS):
            if number % distance == 0:
                block = text[begin : begin + _BLOCK_CHARACTERS]
                kept.append(block)
                kept_bytes += len(block.encode())
            number += 1
            while kept_bytes > budget and len(kept) > 1:
                kept = kept[::2]
                distance *= 2
                kept_bytes = sum(len(block.encode()) for block in kept)
        if read_limit and number * _BLOCK_CHARACTERS >= read_limit:
            break
    return kept


def train_tokenizer(corpus: Corpus, config: DataConfig, destination: Path) -> None:
    """Trains the sentencepiece model that `config` asks for on `corpus`.

    Raises:
        UserError: the corpus is empty, or too small for the vocabulary.
    """
    budget = config.tokenizer.training_bytes
    streams = config.source == "huggingface" and config.streaming
    texts = sample_text(corpus, budget, _STREAM_FACTOR * budget if streams else 0)
    if not texts:
        raise UserError(no_documents(corpus, config))
    train_sentencepiece(iter(texts), config.tokenizer.vocab_size, destination)


def no_documents(corpus: Corpus, config: DataConfig) -> str:
    """Words the error for a corpus without a document."""
    skipped = "; ".join(corpus.skipped.lines()) or "nothing to read"
    return f"data.source {config.source}: has no document with text ({skipped})"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m infini_ds.data.train_tokenizer",
        description="Trains a lossless sentencepiece model for data.tokenizer.model.",
    )
    parser.add_argument("model", help="file to write, for example tokenizer/mine.model")
    parser.add_argument("vocab_size", type=int, help="number of token ids, at least 320")
    parser.add_argument("files", nargs="+", help="as in data.files: .txt, .jsonl, .parquet, globs")
    parser.add_argument("--text-field", default="text", help="of .jsonl, .json and .parquet")
    parser.add_argument(
        "--training-bytes",
        type=int,
        default=TokenizerConfig().training_bytes,
        help="at most this much text, spread over the files (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    try:
        tokenizer = TokenizerConfig(
            vocab_size=options.vocab_size, training_bytes=options.training_bytes
        )
        destination = argument("MODEL", options.model)
        config = DataConfig(
            source="files",
            files=options.files,
            text_field=options.text_field,
            store="",
            tokenizer=tokenizer,
        )
        corpus = Corpus(config)
        Path(destination).parent.mkdir(parents=True, exist_ok=True)
        train_tokenizer(corpus, config, Path(destination))
        trained = load_tokenizer("sentencepiece", destination)
    except (ValueError, OSError) as error:
        message = str(error)
        if isinstance(error, ValidationError):
            message = error.errors()[0]["msg"].removeprefix("Value error, ")
        print(f"error: {one_line(message)}", file=sys.stderr)
        return 2
    for line in corpus.skipped.lines():
        print(line)
    print(f"{options.model}: {trained.vocab_size} ids, fingerprint {trained.fingerprint[:16]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
