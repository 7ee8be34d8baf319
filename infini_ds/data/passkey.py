"""Makes documents that hide pass keys in filler and ask for them at their end.

    ... filler The pass key is 71432. Remember it. 71432 is the pass key. filler ...
    ... filler What is the pass key? The pass key is 71432

Counted in bytes, with BOS before it, a document is a whole number of segments, and the label of its
last position is EOS. A key stands at a uniformly random place before the segments of the questions,
whole or cut by the end of a segment. The questions and their answers end the last segment; if they
need more than one, each of the last segments ends with whole questions. If there are several keys,
each belongs to a name, and they are asked for in a random order of their own, with a full stop
between an answer and the next question. `passkey_wording` has the words.
"""

from collections.abc import Iterator
from itertools import count, pairwise
from typing import Any, NamedTuple

import numpy as np

from infini_ds.config import DataConfig, PasskeyConfig
from infini_ds.data.documents import Corpus, Document
from infini_ds.data.filler import Filler
from infini_ds.data.passkey_wording import NAMES, Asked, asked_keys, names_needed, worded
from infini_ds.errors import UserError

_TRAINING = 0


class Stated(NamedTuple):
    """The place of a statement in a document."""

    piece: int
    """Index of the statement in `PasskeyDocument.before`."""
    depth: float
    """Share of the filler up to the questions' segments that stands before it, from 0 to 1."""


class PasskeyDocument(NamedTuple):
    """A document without its BOS and EOS."""

    before: tuple[bytes, ...]
    """What is before the segments of the questions: filler and statements in turns, filler first
    and last."""
    gaps: tuple[bytes, ...]
    """What stands before each question: filler, if a segment of the questions begins with it; for
    all but the first question, a full stop before that."""
    questions: tuple[tuple[Asked, ...], ...]
    """For each key that is asked for, its values."""
    stated: tuple[tuple[Stated, ...], ...]
    """Where each of these values is stated."""
    segment_length: int

    @property
    def texts(self) -> list[bytes]:
        """The document as the text before the first answer, that answer, the text between it and
        the next answer, and so on up to the last answer."""
        texts = [b"".join(self.before)]
        for gap, question in zip(self.gaps, self.questions, strict=True):
            texts[-1] += gap
            for asked in question:
                texts[-1] += asked.question
                texts += [asked.answer, b""]
        return texts[:-1]

    @property
    def prompt(self) -> bytes:
        """Everything before the first answer."""
        return self.texts[0]

    @property
    def answer(self) -> bytes:
        """The first answer."""
        return self.questions[0][0].answer

    @property
    def position(self) -> int:
        """Byte offset at which the statement of the first answer begins, after its space."""
        return sum(map(len, self.before[: self.stated[0][0].piece])) + 1

    @property
    def cut(self) -> bool:
        """Whether that statement is cut by the end of a segment."""
        return self.is_cut(self.stated[0][0])

    def is_cut(self, stated: Stated) -> bool:
        """Tells whether a statement, without the spaces around it, is cut by a segment's end."""
        # Byte i is position i + 1, as BOS takes a position too.
        begin = sum(map(len, self.before[: stated.piece])) + 2
        last = begin + len(self.before[stated.piece].strip()) - 1
        return begin // self.segment_length != last // self.segment_length


def passkey_random(*key: int) -> np.random.Philox:
    """Returns the random stream of one document, identified by integers of at least 0.

    Training documents use the key (0, segments, number), with the number of pass keys behind it if
    data.passkey.keys is a list; other uses must begin with another number.
    """
    return np.random.Philox(np.random.SeedSequence(key))


class TooShort(UserError):
    """The segments have no room for the keys or the questions."""


def gaps_before(sizes: list[int], length: int) -> list[int]:
    """Divides questions among as many segments as they need, each of which ends with a question.

    Args:
        sizes: sizes of the questions with their answers, in the order of asking.
        length: size of a segment.

    Returns:
        The size of the filler before each question.

    Raises:
        TooShort: a question is larger than a segment.
    """
    if max(sizes) > length:
        raise TooShort
    segments: list[list[int]] = []
    for size in sizes:
        if segments and sum(segments[-1]) + size <= length:
            segments[-1].append(size)
        else:
            segments.append([size])
    return [
        gap
        for questions in segments
        for gap in (length - sum(questions), *[0] * (len(questions) - 1))
    ]


class Passkeys:
    """Generates pass-key documents.

    Raises:
        UserError: there are more keys than names, or text_files are unusable.
    """

    def __init__(self, config: PasskeyConfig):
        most = config.key_counts[-1]
        if names_needed(config, most) > len(NAMES):
            values = f" x data.passkey.values ({config.values})" * (config.form == "variables")
            raise UserError(f"data.passkey.keys ({most}){values} must be at most {len(NAMES)}")
        self._config = config
        self._filler = Filler(config.filler, config.text_files, "data.passkey")

    @property
    def snapshot(self) -> str:
        """A checksum that changes when text_files do."""
        return self._filler.snapshot

    def document(
        self,
        random: np.random.Philox,
        segments: int,
        depth: float | None = None,
        keys: int | None = None,
    ) -> PasskeyDocument:
        """Generates one document of segments x segment_length - 1 bytes, all of them ASCII.

        Args:
            random: stream from `passkey_random`; equal streams give equal documents.
            segments: length in segments, at least 2.
            depth: place of the first key that is asked for, from 0 (first) to 1 (last); by default
                it is uniformly random, as the places of all others are.
            keys: number of keys; by default the largest of data.passkey.keys.

        Raises:
            TooShort: the segments have no room for the keys or the questions.
        """
        config, length = self._config, self._config.segment_length
        keys = keys or config.key_counts[-1]
        statements, questions = worded(config, keys, random)
        texts = [text for of_key in statements for text in of_key]
        stated = sum(map(len, texts))
        sizes = [sum(len(asked.question + asked.answer) for asked in each) for each in questions]
        sizes[1:] = [size + 1 for size in sizes[1:]]  # the full stop before it
        room, gaps = _room(stated, sizes, segments, length)
        if room < 0:
            needed = next(n for n in count(length) if _room(stated, sizes, segments, n)[0] >= 0)
            raise TooShort(
                f"data.passkey.segment_length ({length}) must be at least {needed} for "
                f"{_described(config, keys)} in {segments} segments"
            )
        # The amount of filler before each statement, and the depth that this means.
        drawn = [int(random.random_raw()) % (room + 1) for _ in texts]
        places = [(place, place / (room + 1)) for place in drawn]
        if depth is not None:
            places[0] = (round(depth * room), depth)
        for key in range(keys):  # the values of a key are stated in their order
            own = slice(key * config.values, (key + 1) * config.values)
            places[own] = sorted(places[own])
        filler = self._filler.cut(random, room + sum(gaps))
        order = sorted(range(len(texts)), key=lambda index: places[index][0])
        before = []
        begin = 0
        for index in order:
            place = places[index][0]
            before += [filler[begin:place], texts[index]]
            begin = place
        before.append(filler[begin:room])
        found = [Stated(2 * order.index(i) + 1, share) for i, (_, share) in enumerate(places)]
        asked = range(0, len(questions) * config.values, config.values)
        ends = np.cumsum([room, *gaps]).tolist()
        return PasskeyDocument(
            tuple(before),
            tuple(b"."[: i > 0] + filler[a:b] for i, (a, b) in enumerate(pairwise(ends))),
            tuple(map(tuple, questions)),
            tuple(tuple(found[first : first + config.values]) for first in asked),
            length,
        )


class PasskeyCorpus(Corpus):
    """The documents of `data.source: passkey`: equally many of each length, which take turns, and
    of each number of keys, which take turns within a length.

    The loss weight of the answers is chosen so that the weighted sum over a document, divided by
    its number of tokens, is the mean over all its tokens plus the mean over the answers' tokens.
    The answers of a document together weigh as much as an only one would.
    """

    def __init__(self, config: DataConfig):
        super().__init__(config)
        self._made = config.passkey
        self._passkeys = Passkeys(config.passkey)
        length = config.passkey.segment_length
        self.total_bytes = (
            config.passkey.documents
            * len(config.passkey.key_counts)
            * sum(segments * length - 1 for segments in config.passkey.segments)
        )

    @property
    def snapshot(self) -> str:
        return self._passkeys.snapshot

    def _records(self) -> Iterator[tuple[str, Any]]:
        for number in range(self._made.documents):
            for segments in self._made.segments:
                for keys in self._made.key_counts:
                    yield (
                        f"pass key {number} of {segments} segments",
                        self._record(number, segments, keys),
                    )

    def _record(
        self, number: int, segments: int, keys: int
    ) -> tuple[int, list[tuple[bytes, float]]]:
        """Returns the number of keys and the weighted pieces of a document."""
        grouped = self._config.grouped
        key = (_TRAINING, segments, number, keys) if grouped else (_TRAINING, segments, number)
        texts = self._passkeys.document(passkey_random(*key), segments, keys=keys).texts
        self.done_bytes += sum(map(len, texts))
        answers = sum(map(len, texts[1::2]))
        weights = [1.0, 1 + segments * self._made.segment_length / answers]
        # The last piece, which has no characters, carries the weight of EOS.
        pieces = [*((text, weights[i % 2]) for i, text in enumerate(texts)), (b"", 1.0)]
        return keys if grouped else 0, pieces

    def _document_of(self, name: str, value: Any) -> Document | None:
        keys, pieces = value
        document = super()._document_of(name, pieces)
        return document and document._replace(group=keys)


def _room(stated: int, sizes: list[int], segments: int, length: int) -> tuple[int, list[int]]:
    """Returns the filler before the questions' segments, or -1 if there is no room, and the gaps.

    Args:
        stated: size of all statements.
        sizes: as in `gaps_before`.
    """
    try:
        gaps = gaps_before(sizes, length)
    except TooShort:
        return -1, []
    ends = (sum(sizes) + sum(gaps)) // length
    return max(-1, (segments - ends) * length - 1 - stated), gaps  # BOS takes one position


def _described(config: PasskeyConfig, keys: int) -> str:
    """Describes the keys of a document, for messages."""
    described = f"{keys} key{'s' * (keys > 1)} of {config.digits} digits"
    if config.values > 1:
        described += f" with {config.values} values each"
    asked = asked_keys(config, keys)
    return f"{described}, {asked} asked," if asked > 1 else described
