"""Generates text in bounded memory, however long the prompt and the answer are."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from infini_ds.model.memory import Memory
from infini_ds.model.reading import WINDOW_SEGMENTS, Reader, read_text
from infini_ds.system.ranges import require_finite


class Sampling(NamedTuple):
    """Settings for choosing the next token."""

    temperature: float = 1.0
    """0 means greedy decoding."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach this probability are sampled."""
    top_k: int = 0
    """Only this many of the likeliest tokens are sampled; 0 means all."""

    def check(self) -> None:
        """Raises ValueError if a setting is out of its range."""
        for name, fits, right in (
            ("temperature", 0 <= self.temperature < math.inf, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= 0, "at least 0"),
        ):
            if not fits:
                raise ValueError(f"{name} ({getattr(self, name)}) must be {right}")


def generate(
    self: Reader,
    prompt: Tensor | Sequence[Tensor],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop_token: int | Sequence[int] | None = None,
    memory: Memory | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continues each prompt.

    The prompt is read segment by segment. The key-value cache never holds more than one segment,
    and each full segment is written into the memory.

    Args:
        prompt: [batch, length], or one [length] tensor for each row if lengths differ.
        max_new_tokens: the largest number of tokens to add.
        temperature, top_p, top_k: see `Sampling`.
        stop_token: one or several tokens, each of which ends a row. The rest of the row is filled
            with the (first) stop token.
        memory: the memory of a document that the prompt continues.
        generator: source of the random numbers.

    Returns:
        The new tokens, [batch, up to max_new_tokens].

    Raises:
        ValueError: an empty prompt, or a setting out of its range.
        RunError: logits are not finite.
    """
    sampling = Sampling(temperature, top_p, top_k)
    columns = stream(self, prompt, max_new_tokens, sampling, stop_token, memory, generator)
    return torch.stack(list(columns), dim=1)


@torch.no_grad()
def stream(
    model: Reader,
    prompt: Tensor | Sequence[Tensor],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008, immutable
    stop_token: int | Sequence[int] | None = None,
    memory: Memory | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Works like `generate`, but yields each new column [batch] as soon as it is chosen."""
    sampling.check()
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens ({max_new_tokens}) must be at least 1")
    training = model.training
    model.train(False)
    try:
        hidden, memory = _absorb(model, prompt, memory)
        finished = torch.zeros(memory.batch, dtype=torch.bool, device=hidden.device)
        stops = torch.tensor(_several(stop_token), dtype=torch.int64, device=hidden.device)
        written = 0
        while True:
            logits = model.logits(hidden).float()  # [batch, vocab_size]
            require_finite(logits, model, "the logits of the next token are")
            token = sample(logits, sampling, generator)
            if len(stops):
                token = token.masked_fill(finished, stops[0])
                finished |= torch.isin(token, stops)
            yield token
            written += 1
            if written == max_new_tokens or bool(finished.all()):
                break
            hidden, memory = model.read(token[:, None], memory)
            hidden = hidden[:, -1]
    finally:
        model.train(training)


def _several(stop_token: int | Sequence[int] | None) -> list[int]:
    if stop_token is None:
        return []
    return [stop_token] if isinstance(stop_token, int) else list(stop_token)


def _absorb(
    model: Reader, prompt: Tensor | Sequence[Tensor], memory: Memory | None
) -> tuple[Tensor, Memory]:
    """Reads the prompt. Returns the hidden state of each row's last token, [batch, hidden_size],
    and the memory after it."""
    if isinstance(prompt, Tensor):
        return _absorb_rows(model, prompt, memory)
    if memory is not None:
        raise ValueError("a memory needs a prompt of one length for all rows")
    rows = [_absorb_rows(model, row[None], None) for row in prompt]
    hidden = torch.cat([row_hidden for row_hidden, _ in rows])
    return hidden, Memory.concatenate([row_memory for _, row_memory in rows])


def _absorb_rows(model: Reader, tokens: Tensor, memory: Memory | None) -> tuple[Tensor, Memory]:
    if not tokens.shape[1]:
        raise ValueError("prompt must have at least one token")
    return read_text(model, [tokens], memory, WINDOW_SEGMENTS * model.config.segment_length)


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """Chooses one token for each row, [batch], from fp32 logits [batch, vocab_size]."""
    temperature, top_p, top_k = sampling
    # Scores cannot be divided by a temperature below fp32's normal range: decoding is greedy.
    if temperature < torch.finfo(torch.float32).tiny:
        return logits.argmax(dim=-1)
    likeliest = logits.amax(dim=-1, keepdim=True)
    scores = (logits - likeliest) / temperature
    probabilities, tokens = scores.softmax(dim=-1).sort(dim=-1, descending=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    unlikely = before >= top_p
    unlikely[:, 0] = False
    if top_k:
        unlikely[:, top_k:] = True
    probabilities = probabilities.masked_fill(unlikely, 0)
    choice = torch.multinomial(probabilities, 1, generator=generator)
    return tokens.gather(1, choice)[:, 0]
