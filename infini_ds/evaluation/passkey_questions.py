"""Makes pass-key documents for any tokenizer; each fills whole segments of its tokens.

With plain bytes, a document is the generator's, byte for byte. For other tokenizers, its pieces
(filler, statements, question, answer) are encoded one by one, and the filler is cut so that the
segments are exactly full: the statements stay before the last segment, the question and the answer
in it.
"""

import re
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import numpy as np

from infini_ds.config import PasskeyConfig
from infini_ds.data.passkey import PasskeyDocument, Passkeys, TooShort, passkey_random
from infini_ds.data.store import stored_tokens
from infini_ds.data.tokenizer_base import ByteTokenizer, Tokenizer
from infini_ds.errors import UserError

_STATEMENT = re.compile(rb" The (pass key(?: of \w+)?) is (\d+)\. Remember it\. \2 is the \1\. ")
_QUESTION = b" What is the pass key"
# The seeds of training documents begin with another number, see `passkey_random`.
_DOCUMENT, _DEPTH, _SAMPLE = 1, 2, 3
_SAMPLE_BYTES = 8192


class Question(NamedTuple):
    """A document up to its answer."""

    prompt: np.ndarray
    """The segments x segment_length - digits tokens from BOS to just before the answer."""
    answer: str
    """The correct digits."""
    answer_tokens: int
    """Number of tokens of the answer, which ends in the last segment."""
    depth: int
    """Index of the part of the text before the last segment that holds the key."""
    cut: bool
    """Whether a segment ends within the statement of the key."""


class Questions:
    """Makes questions; each depends only on seed, length and number.

    Args:
        config: settings of the documents; segment_length is the model's, in tokens.
        depths: number of equal parts into which the text before the last segment is divided.
        seed: different seeds make different documents.

    Raises:
        UserError: there are more keys than names, or text_files are unusable.
    """

    def __init__(self, config: PasskeyConfig, tokenizer: Tokenizer, depths: int, seed: int):
        self._config, self._tokenizer = config, tokenizer
        self._depths, self._seed = depths, seed
        self._plain = isinstance(tokenizer, ByteTokenizer)
        self._makers = {config.segment_length: Passkeys(config)}
        self._segment_bytes = config.segment_length
        if not self._plain:
            text = self._document(_SAMPLE_BYTES, passkey_random(_SAMPLE), 2, None).prompt.decode()
            bytes_per_token = len(text) / len(tokenizer.encode_array(text))
            # This probably yields enough tokens for a segment.
            self._segment_bytes = round(1.25 * bytes_per_token * config.segment_length)

    def make(self, segments: int, number: int, samples: int) -> Question:
        """Makes one of the `samples` questions of a length, whose depths are spread evenly.

        Args:
            segments: length of the document with its answer, at least 2.
            number: index of the question, from 0 to samples - 1.

        Raises:
            UserError: the segments are too short for the keys or the question.
        """
        try:
            return self._make(segments, number, samples)
        except TooShort:  # its message may name a setting of training documents
            raise UserError(
                f"model.segment_length ({self._config.segment_length}): too short for the "
                "statements and the question; ask with fewer --keys"
            ) from None

    def _make(self, segments: int, number: int, samples: int) -> Question:
        depth = (2 * number + 1) * self._depths // (2 * samples)
        key = (self._seed, segments, number)
        within = int(passkey_random(_DEPTH, *key).random_raw()) / 2**64
        place = (depth + within) / self._depths
        length = self._segment_bytes
        while True:
            document = self._document(length, passkey_random(_DOCUMENT, *key), segments, place)
            if self._plain:
                prompt = np.frombuffer(document.prompt, dtype=np.uint8)
                return self._question(document, [prompt], depth, document.cut)
            question = self._encoded(document, length, segments, depth)
            if question:
                return question
            length += length // 2  # this text has more bytes per token

    def _document(
        self, length: int, random: np.random.Philox, segments: int, place: float | None
    ) -> PasskeyDocument:
        """Returns a document whose segments have `length` bytes."""
        if length not in self._makers:
            config = self._config.model_copy(update={"segment_length": length})
            self._makers[length] = Passkeys(config)
        return self._makers[length].document(random, segments, place)

    def _encoded(
        self, document: PasskeyDocument, length: int, segments: int, depth: int
    ) -> Question | None:
        """Encodes a document piece by piece; returns None if it has too few tokens."""
        n, edge = self._config.segment_length, (segments - 1) * length - 1
        question = document.prompt.rindex(_QUESTION)
        spans = [found.span() for found in _STATEMENT.finditer(document.prompt, 0, edge)]
        bounds = [0, *chain.from_iterable(spans), edge]
        # Filler and statements alternate; the first and the last piece are filler.
        before = [self._encode(document.prompt[begin:end]) for begin, end in pairwise(bounds)]
        after = self._encode(document.prompt[edge:question])
        asked = self._encode(document.prompt[question:])
        head = _fitted(before, (segments - 1) * n - 1)
        tail = _fitted([after], n - len(asked) - self._config.digits)
        if head is None or tail is None:
            return None
        key = 1 + 2 * [start for start, _ in spans].index(document.position - 1)
        begin = 1 + sum(map(len, head[:key]))
        # As in the generator's documents, the spaces around a statement do not count.
        table = self._tokenizer.table
        solid = [begin + i for i, token in enumerate(head[key]) if table[token].strip()]
        cut = solid[0] // n != solid[-1] // n
        return self._question(document, [*head, *tail, asked], depth, cut)

    def _encode(self, text: bytes) -> np.ndarray:
        return self._tokenizer.encode_array(text.decode())

    def _question(
        self, document: PasskeyDocument, pieces: list[np.ndarray], depth: int, cut: bool
    ) -> Question:
        bos = np.array([self._tokenizer.bos_id], np.uint32)
        prompt = stored_tokens([bos, *pieces], self._tokenizer.vocab_size)
        answer = document.answer.decode()
        return Question(prompt, answer, len(self._tokenizer.encode_array(answer)), depth, cut)


def _fitted(pieces: list[np.ndarray], length: int) -> list[np.ndarray] | None:
    """Cuts pieces to `length` tokens in all, or returns None if they have fewer.

    The first piece and every second one after it are filler, of which each keeps the same share;
    the pieces between them stay whole.

    Raises:
        TooShort: the pieces that stay whole have more than `length` tokens.
    """
    sizes = [len(filler) for filler in pieces[::2]]
    wanted = length - sum(map(len, pieces[1::2]))
    if wanted < 0:
        raise TooShort
    total = sum(sizes)
    if total < wanted:
        return None
    ends = [wanted * end // max(total, 1) for end in accumulate(sizes, initial=0)]
    fitted = list(pieces)
    fitted[::2] = [filler[: ends[i + 1] - ends[i]] for i, filler in enumerate(pieces[::2])]
    return fitted
