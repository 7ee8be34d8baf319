"""Splits packed segments into runs of rows, none of which attends to another."""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from infini_ds.layout import begins_with_padding, made_once

SHORT = 64
"""Tokens from which on a document is a run of its own; below, the calls cost more than they do."""
TOGETHER = 128
"""Tokens that a run of several documents has at most."""


class Run(NamedTuple):
    """Consecutive rows of a segment: one document, or several short ones."""

    start: int
    end: int
    begins: Tensor | None
    """Of several documents: for each row, where in the run its document begins, int64 [rows]."""

    def is_whole(self, n: int) -> bool:
        """Whether it is the only document of a segment of n tokens."""
        return self.end - self.start == n and self.begins is None


def runs_of(begins: Tensor) -> list[list[Run]]:
    """Splits segments, of lanes and segments flattened.

    Args:
        begins: as in Layout, [batch, segments, n]; padding counts as documents of one token.
    """

    def make() -> list[list[Run]]:
        n = begins.shape[-1]
        place = torch.arange(n)
        return [
            _runs(own, _bounds((raw == place).nonzero()[:, 0].tolist(), int((raw < n).sum()), n))
            for raw, own in zip(
                begins.flatten(0, 1).cpu(),
                begins_with_padding(begins).flatten(0, 1).cpu(),
                strict=True,
            )
        ]

    return made_once(begins, ("runs",), make)


def positions_of(begins: Tensor) -> Tensor:
    """Returns the places of tokens in their documents, int64 of the shape of `begins`."""

    def make() -> Tensor:
        place = torch.arange(begins.shape[-1], device=begins.device)
        return place - begins_with_padding(begins)

    return made_once(begins, ("positions",), make)


def unseen(begins: Tensor) -> Tensor:
    """Returns what is added to scores: -inf where a row does not see a column, and else 0.

    Args:
        begins: where the document of each row begins, [..., n].

    Returns:
        fp32 [..., n, n].
    """
    place = torch.arange(begins.shape[-1], device=begins.device)
    seen = (begins[..., None] <= place) & (place <= place[:, None])
    return torch.where(seen, 0.0, float("-inf"))


def _bounds(firsts: list[int], valid: int, n: int) -> list[tuple[int, int, bool]]:
    """Where runs start and end, and whether they are of several documents.

    Args:
        firsts: where documents begin.
        valid: where padding begins.
    """
    bounds: list[tuple[int, int, bool]] = []
    growing = -1  # where the run of short documents starts that may take another one
    for first, end in itertools.pairwise([*firsts, valid]):
        if end - first >= SHORT:
            bounds.append((first, end, False))
            growing = -1
        elif growing >= 0 and end - growing <= TOGETHER:
            bounds[-1] = (growing, end, True)
        else:
            bounds.append((first, end, False))
            growing = first
    padding = range(valid, n, TOGETHER)
    return bounds + [(start, min(start + TOGETHER, n), True) for start in padding]


def _runs(begins: Tensor, bounds: list[tuple[int, int, bool]]) -> list[Run]:
    return [
        Run(start, end, (begins[start:end] - start).long() if several else None)
        for start, end, several in bounds
    ]
