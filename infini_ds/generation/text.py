"""Tokens to text as they come."""

import codecs
from collections.abc import Iterable, Iterator

from infini_ds.data.tokenizer_base import Tokenizer


def text_of(tokenizer: Tokenizer, tokens: Iterable[int], stop: str = "") -> Iterator[str]:
    """The text of tokens, a part after each that ends a character; broken UTF-8 is replaced.

    A character of several tokens (plain bytes, byte fallback) comes when its last byte does. Ends
    before the first `stop`; what may be the beginning of one is held back until it is known.
    """
    decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
    held = ""
    for token in tokens:
        # A model may have more ids than its tokenizer.
        held += decode(tokenizer.table[token] if token < tokenizer.vocab_size else b"")
        if stop and stop in held:
            yield held.partition(stop)[0]
            return
        sure = len(held) - _beginning(stop, held)
        if sure:
            yield held[:sure]
            held = held[sure:]
    held += decode(b"", final=True)
    if held:
        yield held


def _beginning(stop: str, text: str) -> int:
    """Characters at the end of `text` that are the beginning of `stop`, not all of it."""
    longest = min(len(stop) - 1, len(text))
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
