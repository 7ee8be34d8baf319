"""`infini-ds generate` continues a prompt and prints the text as it is generated."""

from typing import NamedTuple

import numpy as np
import torch

from infini_ds.data.chat import Template, Unusable
from infini_ds.data.encoding import without_special
from infini_ds.data.restored import loss_of, restored
from infini_ds.data.text_pieces import TextPieces
from infini_ds.data.tokenizer_base import Tokenizer
from infini_ds.errors import UserError
from infini_ds.generation.text import text_of
from infini_ds.model.fingerprint import fingerprint
from infini_ds.model.generation import Sampling, stream
from infini_ds.model.memory import Memory
from infini_ds.model.reading import call_width, read_to_last_call
from infini_ds.model.transformer import InfiniTransformer
from infini_ds.runs.export import load_for_command
from infini_ds.system.compute_type import place
from infini_ds.system.console import Console
from infini_ds.system.progress import ReadingProgress


class GenerateOptions(NamedTuple):
    """The command's prompt and sampling options."""

    prompt: str | None
    """The prompt itself, or None if it is in `prompt_file`."""
    prompt_file: str | None
    """A text file, see `open_text`."""
    chat: bool
    """Whether the prompt is what a user says, to be written with the chat template."""
    memory: str | None
    """The memory file of a document that the prompt continues."""
    max_new_tokens: int
    temperature: float
    """0 means greedy decoding."""
    top_p: float
    top_k: int
    """0 means all."""
    seed: int | None
    """Seed of the sampling; None draws a new one each time."""
    stop: str
    """The answer ends before this text, or at the end-of-text token; empty means no such text."""


def run(path: str, step: int | None, options: GenerateOptions) -> None:
    """Prints the continuation to stdout and progress to stderr.

    Args:
        path, step: see `load_model`.

    Raises:
        UserError: there is no such model, the memory is another model's, or the prompt is empty.
    """
    console = Console(stderr=True)
    loaded = load_for_command(path, step, console)
    model, tokenizer = loaded.model, loaded.tokenizer
    memory = load_memory(options.memory, model) if options.memory else None
    device = place(model, console)
    if memory:
        memory = memory.to(device, next(model.parameters()).dtype)
    prompt, lost = _tokens(tokenizer, options, begins=memory is None)
    for line in lost:
        console.print(line, style="yellow")
    with ReadingProgress(console, "prompt", len(prompt), "tokens") as progress:
        read = 0

        def on_read(tokens: int) -> None:
            nonlocal read
            read += tokens
            progress.update(read, tokens)

        pieces = [torch.from_numpy(prompt)[None]]
        width = call_width(model.config.segment_length)
        memory, rest = read_to_last_call(model, pieces, memory, width, on_read)
    generator = torch.Generator(device)
    if options.seed is None:
        generator.seed()
    else:
        generator.manual_seed(options.seed)
    sampling = Sampling(options.temperature, options.top_p, options.top_k)
    columns = stream(
        model, rest, options.max_new_tokens, sampling, tokenizer.eos_ids, memory, generator
    )
    for part in text_of(tokenizer, map(int, columns), options.stop):
        print(part, end="", flush=True)
    print()


def load_memory(path: str, model: InfiniTransformer) -> Memory:
    """Loads the memory of one document onto the model's device.

    Raises:
        UserError: the file is missing, is not a memory, or belongs to another model.
    """
    device = next(model.parameters()).device
    memory = Memory.load(path, device, fingerprint(model))
    try:
        memory.check(model.config, 1)
    except ValueError as error:
        raise UserError(f"memory {path}: {error}") from None
    return memory


def _tokens(
    tokenizer: Tokenizer, options: GenerateOptions, begins: bool
) -> tuple[np.ndarray, list[str]]:
    """Returns the prompt's tokens, after BOS if a document begins with it, and lines that say what
    the tokenizer loses of it."""
    text = options.prompt
    if text is None:
        assert options.prompt_file is not None
        text = "".join(TextPieces(options.prompt_file))
    try:
        content = text.encode()
    except UnicodeEncodeError:  # the shell passes on any bytes
        raise UserError("--prompt: is not UTF-8") from None
    bos = [tokenizer.bos_id]
    if options.chat:
        tokens, content = _asked(tokenizer, text)
        tokens = tokens[1:] if tokens[:1].tolist() == bos else tokens
    else:
        tokens = tokenizer.encode_array(text, begins)
    if begins:
        tokens = np.concatenate((np.array(bos, tokens.dtype), tokens))
    if not len(tokens):
        raise UserError("prompt: is empty; a memory needs something to go on with")
    return tokens, loss_of([(restored(tokenizer, tokens, content), len(content))])


def _asked(tokenizer: Tokenizer, text: str) -> tuple[np.ndarray, bytes]:
    """Returns the tokens of a user's message up to where the assistant answers, and the bytes that
    they should restore."""
    if not tokenizer.chat_template:
        raise UserError(
            "--chat: the model's tokenizer has no chat template; leave --chat out, and write the "
            "prompt as the model's documents are"
        )
    template = Template(tokenizer, "--chat: the model's chat template")
    try:
        rendered = template.written([{"role": "user", "content": text}], prompt=True)
    except Unusable as error:
        raise UserError(f"--chat: {error}") from None
    tokens, places = tokenizer.encode_rendered(rendered, [])
    return tokens, without_special(tokenizer, rendered, tokens, places).encode()
