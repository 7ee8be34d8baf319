"""Makes pass-key documents for any tokenizer; each fills whole segments of its tokens.

With plain bytes, a document is the generator's, byte for byte. For other tokenizers, its pieces
(filler, statements, questions, answers) are encoded one by one, and the filler is cut so that the
segments are exactly full: the questions and their answers end the last segments, of which there are
as many as they need, and the statements stay before these.
"""

from itertools import accumulate
from typing import NamedTuple

import numpy as np

from infini_ds.config import PasskeyConfig
from infini_ds.data.passkey import (
    PasskeyDocument,
    Passkeys,
    Stated,
    TooShort,
    gaps_before,
    passkey_random,
)
from infini_ds.data.store import stored_tokens
from infini_ds.data.tokenizer_base import ByteTokenizer, Tokenizer
from infini_ds.errors import UserError

# The seeds of training documents begin with another number, see `passkey_random`.
_DOCUMENT, _DEPTH, _SAMPLE = 1, 2, 3
_SAMPLE_BYTES = 8192


class Question(NamedTuple):
    """A document up to one of its answers. Those of a document share their memory."""

    prompt: np.ndarray
    """The tokens from BOS to just before the answer, with the right answers to the questions before
    it. With the longest answer, that to the last question ends the last segment."""
    before: int
    """Number of its tokens, in whole segments, before the segments of the questions."""
    answer: str
    """The digits or the name that is right."""
    answer_tokens: int
    """Number of tokens of the answer, which ends in the segment of its question."""
    depth: int
    """Index of the part of the text before the questions' segments that holds the answer."""
    cut: bool
    """Whether a segment ends within the statement of the answer."""


class Questions:
    """Makes the questions of documents; they depend only on seed, length and number.

    Args:
        config: settings of the documents; segment_length is the model's, in tokens.
        depths: number of equal parts into which the text before the questions is divided.
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
            text = self._sample().prompt.decode()
            bytes_per_token = len(text) / len(tokenizer.encode_array(text))
            # This probably yields enough tokens for a segment.
            self._segment_bytes = round(1.25 * bytes_per_token * config.segment_length)

    def make(self, segments: int, number: int, samples: int) -> list[Question]:
        """Makes the questions of one of the `samples` documents of a length.

        The depths of the first keys that they ask for are spread evenly; others are at random ones.

        Args:
            segments: length of the document with its answers, at least 2.
            number: index of the document, from 0 to samples - 1.

        Raises:
            UserError: the segments are too short for the keys or the questions.
        """
        try:
            return self._make(segments, number, samples)
        except TooShort:  # its message may name a setting of training documents
            raise UserError(
                f"model.segment_length ({self._config.segment_length}): too short for the "
                f"statements and the questions in {segments} segments; ask in more --segments, or "
                "with fewer --keys"
            ) from None

    def _make(self, segments: int, number: int, samples: int) -> list[Question]:
        depth = (2 * number + 1) * self._depths // (2 * samples)
        key = (self._seed, segments, number)
        within = int(passkey_random(_DEPTH, *key).random_raw()) / 2**64
        place = (depth + within) / self._depths
        length = self._segment_bytes
        while True:
            document = self._document(length, passkey_random(_DOCUMENT, *key), segments, place)
            questions = self._encoded(document, segments)
            if questions:
                return questions
            length += length // 2  # this text has more bytes per token

    def _sample(self) -> PasskeyDocument:
        """Returns a document that shows how many bytes a token has."""
        length = _SAMPLE_BYTES
        while True:
            try:
                return self._document(length, passkey_random(_SAMPLE), 2, None)
            except TooShort:
                length *= 2

    def _document(
        self, length: int, random: np.random.Philox, segments: int, place: float | None
    ) -> PasskeyDocument:
        """Returns a document whose segments have `length` bytes."""
        if length not in self._makers:
            config = self._config.model_copy(update={"segment_length": length})
            self._makers[length] = Passkeys(config)
        return self._makers[length].document(random, segments, place)

    def _encoded(self, document: PasskeyDocument, segments: int) -> list[Question] | None:
        """Encodes a document piece by piece; returns None if it has too few tokens."""
        n = self._config.segment_length
        questions = [
            [(self._encode(asked.question), self._encode(asked.answer)) for asked in question]
            for question in document.questions
        ]
        stops = [self._encode(b"."[: i > 0]) for i in range(len(questions))]
        sizes = [
            len(stop) + sum(len(text) + len(answer) for text, answer in question)
            for stop, question in zip(stops, questions, strict=True)
        ]
        # A model may write the last answer in smaller pieces, down to its bytes.
        longest = len(document.questions[-1][-1].answer)
        sizes[-1] += longest - len(questions[-1][-1][1])
        gaps = gaps_before(sizes, n)
        before = segments * n - sum(sizes) - sum(gaps)
        # Filler and statements alternate; the first and the last piece are filler.
        head = _fitted([self._encode(piece) for piece in document.before], before - 1)
        fillers = [gap[i > 0 :] for i, gap in enumerate(document.gaps)]  # without the full stops
        filler = self._encode(b"".join(fillers))
        if head is None or len(filler) < sum(gaps):
            return None
        pieces, ends = [np.array([self._tokenizer.bos_id], np.uint32), *head], []
        for stop, gap, question in zip(stops, gaps, questions, strict=True):
            pieces += [stop, filler[:gap]]
            filler = filler[gap:]
            for text, answer in question:
                pieces += [text, answer]
                ends.append(sum(map(len, pieces)) - len(answer))
        tokens = stored_tokens(pieces, self._tokenizer.vocab_size)
        asked = [each for question in document.questions for each in question]
        stated = [each for of_key in document.stated for each in of_key]
        return [
            Question(
                tokens[:end],
                before,
                one.answer.decode(),
                len(self._encode(one.answer)),
                min(int(place.depth * self._depths), self._depths - 1),
                self._is_cut(head, place),
            )
            for end, one, place in zip(ends, asked, stated, strict=True)
        ]

    def _is_cut(self, head: list[np.ndarray], stated: Stated) -> bool:
        """Tells whether a segment ends within a statement, without the spaces around it."""
        n, table = self._config.segment_length, self._tokenizer.table
        begin = 1 + sum(map(len, head[: stated.piece]))
        statement = head[stated.piece].tolist()
        solid = [begin + i for i, token in enumerate(statement) if table[token].strip()]
        return solid[0] // n != solid[-1] // n

    def _encode(self, text: bytes) -> np.ndarray:
        return self._tokenizer.encode_array(text.decode())


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
