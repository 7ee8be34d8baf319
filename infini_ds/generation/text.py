"""Decodes tokens to text while they are generated."""

import codecs
from collections.abc import Iterable, Iterator

from infini_ds.data.tokenizer_base import Tokenizer


def text_of(tokenizer: Tokenizer, tokens: Iterable[int], stop: str = "") -> Iterator[str]:
    """Yields the text of tokens in parts, each as soon as its characters are complete.

    A character that takes several tokens (plain bytes, byte fallback) is yielded with its last
    byte, and broken UTF-8 is replaced. The text ends before the first `stop`; whatever may be the
    beginning of `stop` is held back until the next tokens decide.
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
    """Counts the characters at the end of `text` that are a proper prefix of `stop`."""
    longest = min(len(stop) - 1, len(text))
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
