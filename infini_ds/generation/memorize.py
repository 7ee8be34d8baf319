"""`infini-ds memorize`: reads a document of any length and keeps its memory as a file."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from infini_ds.allocator import keep_freed_memory
from infini_ds.conversion.export import load_model
from infini_ds.data.reading_progress import ReadingProgress
from infini_ds.data.text_pieces import TextPieces
from infini_ds.data.tokenizer import Tokenizer
from infini_ds.errors import UserError
from infini_ds.generation.absorb import absorb
from infini_ds.model.fingerprint import fingerprint


def run(path: str, step: int | None, document: str, output: str) -> None:
    """Reads a text in memory that does not grow with it, and writes the model's memory of it.

    The document is open: it begins with BOS and goes on with whatever is read next. Its text is
    tokenised in pieces that end at line ends, see `TextPieces`.

    Args:
        path, step: see `load_model`.
        document: UTF-8 text, plain, .gz or .zst.
        output: the memory's file, replaced where it exists.

    Raises:
        UserError: there is no such model, or the document is empty or cannot be read.
    """
    console = Console(highlight=False, soft_wrap=True)
    text = TextPieces(document)
    keep_freed_memory()
    loaded = load_model(path, step)
    for line in loaded.skipped:
        console.print(line, style="yellow")
    model = loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
    read = 0
    with ReadingProgress(console, "memorize", text.total_bytes, "bytes") as progress:

        def on_read(tokens: int) -> None:
            nonlocal read
            read += tokens
            progress.update(text.done_bytes, tokens)

        memory, rest = absorb(model, _pieces(loaded.tokenizer, text), None, on_read)
        if read + rest.shape[1] == 1:
            raise UserError(f"document {document}: is empty")
        with torch.no_grad():
            _, memory = model.read(rest, memory)
        on_read(rest.shape[1])
        rate = progress.tokens_per_second
    memory.save(output, fingerprint(model))
    console.print(
        f"{output}: memory of {read:,} tokens, {Path(output).stat().st_size:,} bytes "
        f"({rate:,.0f} tokens/s)"
    )


def _pieces(tokenizer: Tokenizer, text: TextPieces) -> Iterator[np.ndarray]:
    yield np.array([tokenizer.bos_id], dtype=np.uint32)
    for piece in text:
        yield tokenizer.encode_array(piece)
