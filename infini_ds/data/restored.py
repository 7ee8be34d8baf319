"""Measures how much of a text its tokens restore, since some tokenizers change text."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from infini_ds.data.tokenizer_base import Tokenizer

_BEFORE, _SHOWN = 12, 32


class Restored(NamedTuple):
    """The result of restoring one text from its tokens."""

    token_bytes: int
    """Number of bytes that the tokens stand for."""
    text_bytes: int
    """Number of bytes common to both, counted with multiplicity and in any order."""
    change: str
    """The first difference, for messages; empty if there is none. An added leading space is shown
    only if nothing else differs."""


def restored(tokenizer: Tokenizer, tokens: np.ndarray, content: bytes) -> Restored:
    """Compares a text with what its tokens stand for.

    Args:
        tokens: tokens of the text, [any length].
        content: the text, encoded as UTF-8.
    """
    back = tokenizer.bytes_of(tokens)
    if back == content:
        return Restored(len(content), len(content), "")
    kept = np.minimum(_occurrences(content), _occurrences(back))
    return Restored(len(back), int(kept.sum()), _change(content, back))


def loss_of(found: Iterable[tuple[Restored, int]]) -> list[str]:
    """Formats a warning if some of the texts do not come back whole; otherwise returns no line.

    Args:
        found: for each text, its result and its size in bytes.
    """
    back = text_bytes = 0
    for restored_, size in found:
        back += restored_.text_bytes
        text_bytes += size
    if back == text_bytes:
        return []
    return [f"warning: the tokenizer restores {back / text_bytes:.2%} of the bytes of the text"]


def _occurrences(content: bytes) -> np.ndarray:
    """Counts how often each byte value occurs: int64 [256]."""
    return np.bincount(np.frombuffer(content, np.uint8), minlength=256)


def _change(before: bytes, after: bytes) -> str:
    if before[:1] != b" " == after[:1] and before != after[1:]:
        after = after[1:]
    shorter = min(len(before), len(after))
    one, other = (np.frombuffer(content, np.uint8)[:shorter] for content in (before, after))
    different = one != other
    first = int(different.argmax()) if different.any() else shorter
    begin = max(first - _BEFORE, 0)
    texts = (c[begin : begin + _SHOWN].decode(errors="ignore") for c in (before, after))
    return "{!r} comes back as {!r}".format(*texts)
