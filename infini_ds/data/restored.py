"""How much of a text comes back from its tokens: not all where a tokenizer changes it."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from infini_ds.data.tokenizer import Tokenizer

_BEFORE, _SHOWN = 12, 32


class Restored(NamedTuple):
    """What comes back of one text."""

    token_bytes: int
    """Bytes that its tokens stand for."""
    text_bytes: int
    """Bytes of the text that are among them, each as often as both have it, in any order."""
    change: str
    """The first difference, for messages; empty if there is none. A space before all is shown only
    where it is the one difference."""


def restored(tokenizer: Tokenizer, tokens: np.ndarray, content: bytes) -> Restored:
    """Compares a text with what its tokens stand for.

    Args:
        tokens: of the text, [any length].
        content: the text, as UTF-8.
    """
    back = tokenizer.bytes_of(tokens)
    if back == content:
        return Restored(len(content), len(content), "")
    kept = np.minimum(_occurrences(content), _occurrences(back))
    return Restored(len(back), int(kept.sum()), _change(content, back))


def loss_of(found: Iterable[tuple[Restored, int]]) -> list[str]:
    """A line to say of texts that do not all come back, none of others.

    Args:
        found: of each text, and its bytes.
    """
    back = text_bytes = 0
    for restored_, size in found:
        back += restored_.text_bytes
        text_bytes += size
    if back == text_bytes:
        return []
    return [f"warning: the tokenizer restores {back / text_bytes:.2%} of the bytes of the text"]


def _occurrences(content: bytes) -> np.ndarray:
    """Of each byte: int64 [256]."""
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
