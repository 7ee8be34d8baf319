"""Tells tokens apart by what a memory could know of them.

A token is *recalled* if it ends a pair of tokens that is rare in the training text, and the
document had the pair before, but farther back than a segment is long: names, numbers and words of
the document's own, which neither frequencies nor local attention give away. It is *near* if the
pair stood at most a segment's length before. This is the associative recall of Arora et al. 2023
(Zoology, arXiv 2312.04927), with a distance.
"""

import numpy as np

from infini_ds.data.store import Split

KINDS = ("recalled", "near", "other")
RARE = 2e-5
"""Largest share of the training text's pairs that a rare pair has."""
_COUNTED = 20_000_000
"""Tokens of the training text of which pairs are counted."""


def token_kinds(
    training: Split, documents: list[np.ndarray], vocab_size: int, segment_length: int
) -> list[np.ndarray]:
    """Returns the kind of each token of some documents, as an index into KINDS.

    Args:
        training: the text in which pairs are counted.
        documents: tokens of each document, int [length].

    Returns:
        For each document int8 [length - 1]: the kinds of all tokens but the first, which has no
        token before it.
    """
    text = np.asarray(training.data[:_COUNTED]).astype(np.int64)
    pairs, counts = np.unique(_pairs(text, vocab_size), return_counts=True)
    common = pairs[counts > RARE * max(1, len(text) - 1)]
    return [_kinds(_pairs(tokens, vocab_size), common, segment_length) for tokens in documents]


def _pairs(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Numbers the pairs that begin at each token but the last."""
    tokens = tokens.astype(np.int64)
    return tokens[:-1] * vocab_size + tokens[1:]


def _kinds(pairs: np.ndarray, common: np.ndarray, segment_length: int) -> np.ndarray:
    order = np.argsort(pairs, kind="stable")
    again = np.flatnonzero(pairs[order][1:] == pairs[order][:-1])
    distance = np.zeros(len(pairs), dtype=np.int64)  # to the same pair before; 0 without one
    distance[order[again + 1]] = order[again + 1] - order[again]
    kinds = np.full(len(pairs), KINDS.index("other"), dtype=np.int8)
    kinds[(distance > 0) & (distance <= segment_length)] = KINDS.index("near")
    kinds[distance > segment_length] = KINDS.index("recalled")
    kinds[np.isin(pairs, common)] = KINDS.index("other")
    return kinds
