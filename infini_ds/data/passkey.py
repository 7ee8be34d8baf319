"""Makes documents that hide a pass key in filler and ask for it at their end.

    ... filler The pass key is 71432. Remember it. 71432 is the pass key. filler ...
    ... filler What is the pass key? The pass key is 71432

Counted in bytes, with BOS before it, a document is a whole number of segments, and the label of its
last position is EOS. The key stands at a uniformly random place before the last segment, whole or
cut by the end of a segment; the question and the answer end the last segment. If there are several
keys, each belongs to a name, and the question asks for one of them.
"""

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from infini_ds.config import DataConfig, PasskeyConfig
from infini_ds.data.documents import Corpus
from infini_ds.errors import UserError

STANDARD = (
    b"The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)
"""The filler of Mohtashami & Jaggi (2023), arXiv 2305.16300."""
# All names have one length, so that documents of as many segments and keys have equal room.
NAMES = [
    "Adam", "Alan", "Alex", "Anna", "Bert", "Carl", "Cora", "Dana", "Dean", "Dora", "Earl",
    "Edna", "Emil", "Emma", "Eric", "Erin", "Fred", "Gary", "Gina", "Greg", "Hans", "Hope",
    "Hugo", "Ivan", "Jack", "Jane", "John", "Jose", "Judy", "June", "Karl", "Kate", "Kurt",
    "Lars", "Lena", "Lisa", "Luis", "Lynn", "Mark", "Mary", "Mike", "Nina", "Noah", "Nora",
    "Olga", "Omar", "Otto", "Owen", "Paul", "Pete", "Rita", "Rosa", "Ross", "Ruth", "Ryan",
    "Sara", "Sean", "Stan", "Tina", "Toby", "Todd", "Vera", "Will", "Zach",
]  # fmt: skip
# Six of the 32 characters are spaces, which makes words of about four letters.
_NOISE = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz      ", dtype=np.uint8)
# At most this much text is kept to cut filler from.
_TEXT_BYTES = 64 << 20
_TRAINING = 0


class PasskeyDocument(NamedTuple):
    """A document without its BOS and EOS."""

    prompt: bytes
    """Everything before the answer."""
    answer: bytes
    """The digits that the question asks for."""
    position: int
    """Byte offset in the prompt at which the statement of that key begins."""
    cut: bool
    """Whether that statement is cut by the end of a segment."""


def passkey_random(*key: int) -> np.random.Philox:
    """Returns the random stream of one document, identified by integers of at least 0.

    Training documents use the key (0, segments, number); other uses must begin with another number.
    """
    return np.random.Philox(np.random.SeedSequence(key))


class TooShort(UserError):
    """The segments have no room for the keys or the question."""


class Passkeys:
    """Generates pass-key documents.

    Raises:
        UserError: there are more keys than names, or text_files are unusable.
    """

    def __init__(self, config: PasskeyConfig):
        if config.keys > len(NAMES):
            raise UserError(f"data.passkey.keys ({config.keys}) must be at most {len(NAMES)}")
        self._config = config
        self._filler = {"standard": _standard, "noise": _noise, "text": self._cut_text}[
            config.filler
        ]
        self._corpus = _text_corpus(config) if config.filler == "text" else None

    @property
    def snapshot(self) -> str:
        """A checksum that changes when text_files do."""
        return self._corpus.snapshot if self._corpus else ""

    def document(
        self, random: np.random.Philox, segments: int, depth: float | None = None
    ) -> PasskeyDocument:
        """Generates one document of segments x segment_length - 1 bytes, all of them ASCII.

        Args:
            random: stream from `passkey_random`; equal streams give equal documents.
            segments: length in segments, at least 2.
            depth: place of the key before the last segment, from 0 (first) to 1 (last); by default
                it is uniformly random.

        Raises:
            TooShort: the segments have no room for the keys or the question.
        """
        keys, length = self._config.keys, self._config.segment_length
        numbers = [_digits(random, self._config.digits) for _ in range(keys)]
        subjects = ["pass key"]
        if keys > 1:
            chosen = np.argsort(random.random_raw(len(NAMES)), kind="stable")[:keys]
            subjects = [f"pass key of {NAMES[name]}" for name in chosen]
        statements = [
            f" The {subject} is {number}. Remember it. {number} is the {subject}. ".encode()
            for subject, number in zip(subjects, numbers, strict=True)
        ]
        question = f" What is the {subjects[0]}? The {subjects[0]} is ".encode()  # the first key
        answer = numbers[0].encode()

        needed = max(len(question + answer), -(-(keys * len(statements[0]) + 1) // (segments - 1)))
        if length < needed:
            raise TooShort(
                f"data.passkey.segment_length ({length}) must be at least {needed} for "
                f"{keys} keys of {len(answer)} digits in {segments} segments"
            )
        # Bytes of filler before the last segment, where BOS takes one position.
        room = (segments - 1) * length - 1 - keys * len(statements[0])
        # The amount of filler before each statement.
        places = [int(random.random_raw()) % (room + 1) for _ in statements]
        if depth is not None:
            places[0] = round(depth * room)
        filler = self._filler(random, room + length - len(question + answer))
        parts = []
        begin = before = position = 0
        for index in sorted(range(keys), key=lambda index: places[index]):
            if index == 0:
                position = places[index] + before + 1  # after the statement's space
            parts += [filler[begin : places[index]], statements[index]]
            begin = places[index]
            before += len(statements[index])
        prompt = b"".join([*parts, filler[begin:], question])
        last = position + len(statements[0].strip()) - 1
        # BOS takes a position too.
        cut = (position + 1) // length != (last + 1) // length
        return PasskeyDocument(prompt, answer, position, cut)

    def _cut_text(self, random: np.random.Philox, length: int) -> bytes:
        """Cuts out text from the beginning of a random line."""
        text = self._text
        begin = text.find(b"\n", int(random.random_raw()) % len(text)) + 1
        return _cyclic(text, begin, length)

    @cached_property
    def _text(self) -> bytes:
        """The corpus's text without characters beyond ASCII, so that it can be cut anywhere."""
        assert self._corpus
        parts, size = [], 0
        for document in self._corpus:
            parts.append(document.text.encode("ascii", "ignore"))
            size += len(parts[-1])
            if size >= _TEXT_BYTES:
                break
        text = b"\n".join(parts)
        if not text:
            raise UserError("data.passkey.text_files: have no text; name others")
        return text


class PasskeyCorpus(Corpus):
    """The documents of `data.source: passkey`: equally many of each length, which take turns.

    The loss weight of an answer is chosen so that the weighted sum over a document, divided by its
    number of tokens, is the mean over all its tokens plus the mean over the answer's tokens.
    """

    def __init__(self, config: DataConfig):
        super().__init__(config)
        self._made = config.passkey
        self._passkeys = Passkeys(config.passkey)
        length = config.passkey.segment_length
        self.total_bytes = config.passkey.documents * sum(
            segments * length - 1 for segments in config.passkey.segments
        )

    @property
    def snapshot(self) -> str:
        return self._passkeys.snapshot

    def _records(self) -> Iterator[tuple[str, Any]]:
        for number in range(self._made.documents):
            for segments in self._made.segments:
                random = passkey_random(_TRAINING, segments, number)
                document = self._passkeys.document(random, segments)
                weight = 1 + segments * self._made.segment_length / self._made.digits
                self.done_bytes += len(document.prompt + document.answer)
                # The last piece, which has no characters, carries the weight of EOS.
                pieces = [(document.prompt, 1.0), (document.answer, weight), (b"", 1.0)]
                yield f"pass key {number} of {segments} segments", pieces


def _digits(random: np.random.Philox, digits: int) -> str:
    return "".join(str(int(raw) % 10) for raw in np.atleast_1d(random.random_raw(digits)))


def _standard(random: np.random.Philox, length: int) -> bytes:
    return _cyclic(STANDARD, int(random.random_raw()) % len(STANDARD), length)


def _noise(random: np.random.Philox, length: int) -> bytes:
    raw = np.asarray(random.random_raw(-(-length // 8)), dtype="<u8").view(np.uint8)
    return _NOISE[raw[:length] % len(_NOISE)].tobytes()


def _cyclic(text: bytes, begin: int, length: int) -> bytes:
    """Returns `length` bytes of an endlessly repeated text, starting at `begin`."""
    first = text[begin : begin + length]
    return (first + text * math.ceil((length - len(first)) / len(text)))[:length]


def _text_corpus(config: PasskeyConfig) -> Corpus:
    if not config.text_files:
        return Corpus(DataConfig(store=""))
    try:
        return Corpus(DataConfig(source="files", files=config.text_files, store=""))
    except UserError as error:
        raise UserError(str(error).replace("data.files", "data.passkey.text_files", 1)) from None
