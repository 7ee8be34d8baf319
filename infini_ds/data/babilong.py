"""Makes documents that hide facts of bAbI kind in filler and ask about them at their end.

    ... filler Mary went to the garden. filler John took the apple. filler Where is Mary? garden.

The tasks are those of `babilong_world`, and the form follows BABILong (Kuratov et al. 2024,
arXiv 2406.10149). The facts stand in their order at random places between words before the last
segment; the end of a segment may cut them. The last question ends at the same position of the last
segment in every document, so that the room left for the answer says nothing about it. Questions
before it stand with their answers right before it, so that a document teaches more.

With any tokenizer, a document's pieces are encoded one by one, and spaces fill what no whole word
does, so that lengths in tokens are exact. A tokenizer that is still to be trained is trained on the
shortest of these documents, with lengths counted in bytes: in them the words of facts are frequent
enough to become tokens of their own.
"""

from collections.abc import Iterator
from functools import cache, cached_property
from itertools import chain, zip_longest
from typing import Any, NamedTuple

import numpy as np

from infini_ds.config import FEWEST_FACTS, BabilongConfig, BabilongTask, DataConfig
from infini_ds.data.babilong_world import Asked, Draws, all_answers, all_facts, all_questions, tell
from infini_ds.data.documents import Corpus
from infini_ds.data.filler import Filler
from infini_ds.data.passkey import TooShort, passkey_random
from infini_ds.data.tokenizer import load_tokenizer
from infini_ds.data.tokenizer_base import ByteTokenizer, Tokenizer
from infini_ds.data.whole_words import cut_to_words, drop_a_word, from_a_word
from infini_ds.errors import UserError

# The keys of evaluated documents' random streams begin with other numbers, see `passkey_random`.
_TRAINING, _SAMPLE = 0, 3
_SAMPLE_BYTES = 8192
_TOKEN_BYTES = 4
"""About the bytes of a token that is not known yet."""
# Text that is 128 times as long as needed and still has too few tokens has no words to speak of.
_DOUBLINGS = 8
# Text is cut again, in so many rounds, until so few tokens are missing or too many: dropping words
# one by one takes minutes where a long text has more tokens in a place than elsewhere.
_FEW, _ROUNDS = 64, 8


class BabilongDocument(NamedTuple):
    """A document without its BOS and EOS."""

    pieces: list[str]
    """Everything up to the first question, in pieces that are encoded one by one."""
    asked: list[Asked]
    """The questions with the space before each, and the answers with the space before and the full
    stop after each, encoded one by one too."""
    facts: list[str]
    """The sentences that are hidden, in their order."""


class Babilong:
    """Generates documents whose lengths are exact in tokens.

    Raises:
        UserError: text_files or the tokenizer are unusable.
    """

    def __init__(self, config: BabilongConfig, tokenizer: Tokenizer):
        self._config, self._tokenizer = config, tokenizer
        self._plain = isinstance(tokenizer, ByteTokenizer)
        self._filler = Filler(config.filler, config.text_files, "data.babilong")
        if self.count(" ") != 1:
            raise UserError("data.tokenizer: has no token for a space, which fills documents up")
        self._longest_fact = max(
            self.count(_spaced(fact), begins) for fact in all_facts() for begins in (False, True)
        )
        self._longest_question = max(self.count(_spaced(asked)) for asked in all_questions())
        self.longest_answer = max(self.count(_as_answer(answer)) for answer in all_answers())
        """Tokens of the longest answer, for which the last segment has room."""

    @property
    def snapshot(self) -> str:
        """A checksum that changes when text_files do."""
        return self._filler.snapshot

    def count(self, text: str, begins: bool = False) -> int:
        """Returns the number of tokens of a piece; see `Tokenizer.encode_array`."""
        return len(text) if self._plain else len(self._tokenizer.encode_array(text, begins))

    def document(
        self, random: np.random.Philox, task: BabilongTask, segments: int
    ) -> BabilongDocument:
        """Generates one document of ASCII text.

        With BOS, everything before the last answer has segments x segment_length - longest_answer
        tokens.

        Args:
            random: stream from `passkey_random`; equal streams give equal documents.
            segments: length with the answer, at least 2.

        Raises:
            TooShort: the segments have no room for the facts or the question.
            UserError: text_files have no text.
        """
        n = self._config.segment_length
        before = (segments - 1) * n - 1
        fewest, most = self._bounds(task, segments, before)
        draws = Draws(random)
        facts = fewest + draws.below(most - fewest + 1)
        config = self._config
        story = tell(random, task, facts, config.max_questions, config.answer_steps)
        places = sorted(draws.share() for _ in story.facts)
        head = self._filled(random, before, list(map(_spaced, story.facts)), places)
        asked, room = self._fitting(story.asked)
        pieces = [*head, *self._filled(random, room)]
        if self._plain:
            pieces = ["".join(pieces)]
        return BabilongDocument(pieces, asked, story.facts)

    def _fitting(self, asked: list[Asked]) -> tuple[list[Asked], int]:
        """Returns as many questions as fit into the last segment, worded, and the tokens that they
        leave before them."""
        fitting, room = [], self._config.segment_length - self.longest_answer
        for question, answer in asked:
            spaced = Asked(_spaced(question), _as_answer(answer))
            needed = self.count(spaced.question)
            if fitting:
                needed += self.count(fitting[-1].answer)
            if needed > room:
                break
            fitting.append(spaced)
            room -= needed
        return fitting, room

    def _bounds(self, task: BabilongTask, segments: int, before: int) -> tuple[int, int]:
        """Returns the fewest and the most facts that fit before the last segment."""
        config, n = self._config, self._config.segment_length
        needed = self._longest_question + self.longest_answer
        if n < needed:
            raise TooShort(
                f"data.babilong.segment_length ({n}) must be at least {needed} for a question and "
                "its answer"
            )
        fewest = max(config.min_facts, FEWEST_FACTS[task])
        room = before // self._longest_fact
        if room < fewest:
            raise TooShort(
                f"data.babilong.segment_length ({n}): {segments} segments have room for {room} "
                f"facts before the last one, and {task} needs {fewest}; use longer segments or "
                "more of them"
            )
        return fewest, min(config.max_facts, room)

    def _filled(
        self,
        random: np.random.Philox,
        tokens: int,
        sentences: list[str] | None = None,
        places: list[float] | None = None,
    ) -> list[str]:
        """Returns pieces of exactly `tokens` tokens: sentences with filler around them.

        Args:
            sentences: with them, the document begins here.
            places: growing, where in the filler each sentence stands, from 0 to 1.
        """
        begins = sentences is not None
        sentences = sentences or []
        count = cache(self.count)  # all pieces but one stay what they are when a word is dropped
        room = tokens - sum(map(count, sentences))
        text, found = self._text(random, room)

        def mixed(fillers: list[str]) -> tuple[list[str], int]:
            """Returns the pieces, and how many tokens they have too many."""
            pairs = chain.from_iterable(zip_longest(fillers, sentences, fillvalue=""))
            pieces = [piece for piece in pairs if piece]
            used = sum(count(piece, begins and i == 0) for i, piece in enumerate(pieces))
            return pieces, used - tokens

        size = len(text) * room // found
        fillers = cut_to_words(text, size, places or [])
        pieces, over = mixed(fillers)
        for _ in range(_ROUNDS):
            if abs(over) <= _FEW:
                break
            size = min(size - len(text) * over // found, len(text))
            fillers = cut_to_words(text, size, places or [])
            pieces, over = mixed(fillers)
        while over > 0:
            drop_a_word(fillers)
            pieces, over = mixed(fillers)
        return pieces + [" "] * -over

    def _text(self, random: np.random.Philox, tokens: int) -> tuple[str, int]:
        """Returns filler that begins between two words and has more than so many tokens."""
        enough = round(self._bytes_per_token * tokens) + 64
        for doubling in range(_DOUBLINGS):
            text = from_a_word(self._filler.cut(random, enough << doubling).decode())
            if (found := self.count(text)) > tokens:
                return text, found
        raise UserError("data.babilong.text_files: have too few words; name others")

    @cached_property
    def _bytes_per_token(self) -> float:
        """About the bytes of filler that yield a token, and rather too many."""
        if self._plain:
            return 1.0
        text = self._filler.cut(passkey_random(_SAMPLE), _SAMPLE_BYTES).decode()
        return 1.25 * len(text) / max(self.count(text), 1)


class BabilongCorpus(Corpus):
    """The documents of `data.source: babilong`: equally many of each task and length, in turns.

    The loss weight of answers is chosen so that the weighted sum over a document, divided by its
    number of tokens, is the mean over all its tokens plus the mean over the answers' tokens.

    Args:
        tokenizer: None takes that of the config or, where that is still to be trained, makes
            documents to train it on.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer | None = None):
        super().__init__(config)
        self._made = config.babilong
        untrained = config.tokenizer.kind == "sentencepiece" and not config.tokenizer.model
        if tokenizer is None and untrained:
            tokenizer = ByteTokenizer()
            n = _TOKEN_BYTES * self._made.segment_length
            shortest = self._made.segments[:1]
            self._made = self._made.model_copy(update={"segment_length": n, "segments": shortest})
        tokenizer = tokenizer or load_tokenizer(config.tokenizer.kind, config.tokenizer.model)
        self._babilong = Babilong(self._made, tokenizer)
        # Progress is counted in positions, since a document's bytes are known when it is made.
        documents = self._made.documents * len(self._made.tasks)
        self.total_bytes = documents * sum(self._made.segments) * self._made.segment_length

    @property
    def snapshot(self) -> str:
        return self._babilong.snapshot

    def _records(self) -> Iterator[tuple[str, Any]]:
        for number in range(self._made.documents):
            for segments in self._made.segments:
                for task in self._made.tasks:
                    positions = segments * self._made.segment_length
                    self.done_bytes += positions
                    random = babilong_random(_TRAINING, task, segments, number)
                    document = self._babilong.document(random, task, segments)
                    yield (
                        f"{task} {number} of {segments} segments",
                        self._weighted(document, positions),
                    )

    def _weighted(self, document: BabilongDocument, positions: int) -> list[tuple[str, float]]:
        sizes = [self._babilong.count(answer) for _, answer in document.asked]
        length = positions - self._babilong.longest_answer + sizes[-1]
        weight = 1 + length / sum(sizes)
        asked = [
            piece
            for question, answer in document.asked
            for piece in ((question, 1.0), (answer, weight))
        ]
        # The last piece, which has no characters, carries the weight of EOS.
        return [*((piece, 1.0) for piece in document.pieces), *asked, ("", 1.0)]


def babilong_random(use: int, task: BabilongTask, *key: int) -> np.random.Philox:
    """Returns the random stream of one document; training documents have the use 0."""
    return passkey_random(use, int(task.removeprefix("qa")), *key)


def _spaced(sentence: str) -> str:
    return f" {sentence}"


def _as_answer(answer: str) -> str:
    return f" {answer}."
