"""A stand-in for a model whose memory is the text that it has read."""

from types import SimpleNamespace

import torch
from torch import nn


class Oracle(nn.Module):
    """Reads whole segments, and answers by looking through the text; a subclass says how.

    Attributes:
        calls: number of tokens of each call that read.
    """

    def __init__(self, tokenizer, segment_length: int):
        super().__init__()
        self.tokenizer, self.n = tokenizer, segment_length
        self.config = SimpleNamespace(segment_length=segment_length)
        self.nothing = nn.Parameter(torch.zeros(()))
        self.calls: list[int] = []

    def read(self, tokens, memory):
        self.calls.append(tokens.numel())
        assert tokens.shape[1] % self.n == 0
        hidden = torch.zeros(*tokens.shape, 1)
        return hidden, tokens if memory is None else torch.cat((memory, tokens), dim=1)

    def generate(self, prompt, max_new_tokens, temperature, memory):
        assert temperature == 0
        assert prompt.shape[1] + max_new_tokens <= self.n
        rows = prompt if memory is None else torch.cat((memory, prompt), dim=1)
        answers = [self.answer(row, memory is not None) for row in rows.tolist()]
        return torch.tensor([(ids + [0] * max_new_tokens)[:max_new_tokens] for ids in answers])

    def answer(self, row: list[int], reads: bool) -> list[int]:
        """Returns the tokens of the answer; `reads` tells whether the row holds what was read."""
        raise NotImplementedError


class Progress:
    """Shows nothing."""

    def read(self, tokens: int) -> None: ...

    def answered(self, documents: int) -> None: ...
