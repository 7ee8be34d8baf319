"""`infini-ds memorize` reads a document of any length and writes its memory to a file."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from infini_ds.data.restored import Restored, loss_of, restored
from infini_ds.data.text_files import STANDARD_INPUT
from infini_ds.data.text_pieces import TextPieces
from infini_ds.errors import UserError
from infini_ds.model.fingerprint import fingerprint
from infini_ds.model.reading import call_width, read_text
from infini_ds.runs.export import load_for_command
from infini_ds.system.compute_type import place
from infini_ds.system.console import Console
from infini_ds.system.progress import ReadingProgress
from infini_ds.system.ranges import require_finite
from infini_ds.system.whole_file import check_writable


def run(path: str, step: int | None, document: str, output: str) -> None:
    """Reads a text of any length in bounded RAM, and writes the model's memory of it.

    The document begins with BOS and is left open, so that the text read next continues it. Its text
    is tokenised in pieces that end at line ends, see `TextPieces`.

    Args:
        path, step: see `load_model`.
        document: a text file, see `open_text`.
        output: the memory file to write, which is replaced if it exists.

    Raises:
        UserError: there is no such model, the document is empty or cannot be read, or the output
            cannot be written.
        RunError: what the model computes from the text is not finite.
    """
    console = Console()
    text = TextPieces(document)
    if Path(output).exists() and document != STANDARD_INPUT and Path(output).samefile(document):
        raise UserError(f"--output {output}: is the document itself")
    check_writable(output, "--output")
    loaded = load_for_command(path, step, console)
    model, tokenizer = loaded.model, loaded.tokenizer
    reader = fingerprint(model)
    place(model, console)
    encoded = read = 0
    found: list[tuple[Restored, int]] = []
    with ReadingProgress(console, "memorize", text.total_bytes, "bytes") as progress:

        def pieces() -> Iterator[Tensor]:
            nonlocal encoded
            encoded += 1
            yield torch.tensor([[tokenizer.bos_id]])
            for number, piece in enumerate(text):
                tokens = tokenizer.encode_array(piece, begins=number == 0)
                content = piece.encode()
                found.append((restored(tokenizer, tokens, content), len(content)))
                encoded += len(tokens)
                yield torch.from_numpy(tokens.astype(np.int64))[None]

        def on_read(tokens: int) -> None:
            nonlocal read
            read += tokens
            # The file is read far ahead of the model, which takes many calls for a piece.
            progress.update(text.done_bytes * read // encoded, tokens)

        width = call_width(model.config.segment_length)
        hidden, memory = read_text(model, pieces(), None, width, on_read)
        if read == 1:
            raise UserError(f"document {document}: is empty")
        with torch.no_grad():
            results = (model.logits(hidden), memory.kv, memory.norm)
        for result in results:
            require_finite(result, model, "what the model makes of the text is")
        rate = progress.tokens_per_second
    memory.save(output, reader)
    for line in loss_of(found):
        console.print(line, style="yellow")
    console.print(
        f"{output}: memory of {read:,} tokens, {Path(output).stat().st_size:,} bytes "
        f"({rate:,.0f} tokens/s)"
    )
