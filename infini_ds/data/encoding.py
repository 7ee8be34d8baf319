"""Encodes the documents of a corpus in its order, with several processes.

Each worker has its own connection, and only this process holds the other end. When either side
dies, however suddenly, the other reads the end of the stream instead of waiting forever. (The
standard library's pools share one pipe for all results, so a worker that is killed while it writes
leaves the parent waiting for the rest.)
"""

import contextlib
import hashlib
import multiprocessing
import os
import queue
import signal
import threading
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from infini_ds.data.documents import Corpus, Document, Span
from infini_ds.data.restored import Restored, restored
from infini_ds.data.store import stored_tokens
from infini_ds.data.tokenizer import load_tokenizer
from infini_ds.data.tokenizer_base import Tokenizer
from infini_ds.errors import UserError

# Documents go to the workers in batches of about this many characters, a fraction of a second each.
_BATCH_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 2048
# Batches queued per worker, so that the next one is there when one is done. This bounds memory too.
_BATCHES_PER_WORKER = 2


class Encoded(NamedTuple):
    """A document in the form in which it is stored."""

    tokens: np.ndarray
    """[tokens]: BOS, the text's tokens, EOS."""
    text_bytes: int
    """Size of the text in bytes."""
    restored: Restored
    """How much of the text its tokens restore."""
    draw: float
    """A hash of the text in [0, 1); the document is held out if it is below held_out_fraction."""
    weights: np.ndarray | None = None
    """float32 [tokens]: loss weight of each token (0 for BOS), if the corpus has weights."""
    group: int = 0
    """As of the `Document`."""


def encode(tokenizer: Tokenizer, text: str, spans: tuple[Span, ...] = ()) -> Encoded:
    """Encodes one document, span by span if it has spans."""
    parts = []
    begin = 0
    for characters, _ in spans or (Span(len(text), 1.0),):
        parts.append(tokenizer.encode_array(text[begin : begin + characters], begin == 0))
        begin += characters
    bos, eos = (np.array([i], np.uint32) for i in (tokenizer.bos_id, tokenizer.eos_id))
    tokens = stored_tokens([bos, *parts, eos], tokenizer.vocab_size)
    weights = None
    if spans:
        of_part = np.array([0, *(weight for _, weight in spans), spans[-1].weight], np.float32)
        weights = np.repeat(of_part, [1, *map(len, parts), 1])
    content = text.encode()
    back = restored(tokenizer, tokens, content)
    return Encoded(tokens, len(content), back, _draw(content), weights)


def encode_rendered(tokenizer: Tokenizer, text: str, spans: tuple[Span, ...]) -> Encoded:
    """Encodes a document that a chat template has written.

    BOS and EOS are added unless the template has written them there. A token has the weight of
    the part in which it lies; where it lies in several, one with weight is enough, as in
    transformers' masks of the assistant.
    """
    lengths = [characters for characters, _ in spans]
    ids, places = tokenizer.encode_rendered(text, np.cumsum(lengths).tolist())
    sums = np.r_[0, np.cumsum(np.repeat([weight for _, weight in spans], lengths))]
    own = sums[places[:, 1]] > sums[places[:, 0]]
    bos, eos = (np.array([i], np.uint32) for i in (tokenizer.bos_id, tokenizer.eos_id))
    bos, eos = bos[: not np.array_equal(ids[:1], bos)], eos[: not np.array_equal(ids[-1:], eos)]
    tokens = stored_tokens([bos, ids, eos], tokenizer.vocab_size)
    weights = np.r_[np.zeros(len(bos)), own, np.full(len(eos), spans[-1].weight)]
    content = without_special(tokenizer, text, ids, places).encode()
    back = restored(tokenizer, tokens, content)
    return Encoded(tokens, len(content), back, _draw(text.encode()), weights.astype(np.float32))


def without_special(tokenizer: Tokenizer, text: str, ids: np.ndarray, places: np.ndarray) -> str:
    """Returns the text without what became special tokens, which stand for no bytes."""
    special = tokenizer.special_tokens
    parts, at = [], 0
    for i in np.flatnonzero(np.isin(ids, [*special.values()])):
        begin, end = places[i]
        if special.get(text[begin:end].strip()) == ids[i]:
            parts.append(text[at:begin])
            at = end
    return "".join(parts) + text[at:]


def _draw(content: bytes) -> float:
    return int.from_bytes(hashlib.sha256(content).digest()[:6], "big") / 2**48


def _encode_all(tokenizer: Tokenizer, batch: list[Document]) -> list[Encoded]:
    return [
        (encode_rendered if document.rendered else encode)(
            tokenizer, document.text, document.spans
        )._replace(group=document.group)
        for document in batch
    ]


def encoded_batches(
    corpus: Corpus, kind: str, model: str | Path, workers: int
) -> Iterator[list[Encoded]]:
    """Encodes all documents of a corpus in its order, with `workers` processes (1: in this one).

    Raises:
        UserError: a worker was killed, or the corpus cannot be read.
    """
    if workers == 1:
        tokenizer = load_tokenizer(kind, model)
        for batch in _batches(corpus):
            yield _encode_all(tokenizer, batch)
        return
    # Batches are dealt to the workers in turn, so the oldest one under way is the next in order.
    under_way: deque[tuple[str, Connection]] = deque()
    connections: list[Connection] = []
    with contextlib.ExitStack() as stack:
        for number, batch in enumerate(_batches(corpus)):
            if number < workers:  # a small corpus does not need all of them
                connections.append(stack.enter_context(_worker(kind, model)))
            if len(under_way) == workers * _BATCHES_PER_WORKER:
                yield _receive(*under_way.popleft())
            under_way.append((batch[0].name, connections[number % workers]))
            _send(batch, *under_way[-1])
        while under_way:
            yield _receive(*under_way.popleft())


def _batches(corpus: Corpus) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in corpus:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _send(batch: list[Document], name: str, connection: Connection) -> None:
    try:
        connection.send(batch)
    except OSError:
        raise _killed(name) from None


def _receive(name: str, connection: Connection) -> list[Encoded]:
    try:
        return connection.recv()
    except (EOFError, OSError):
        raise _killed(name) from None


def _killed(name: str) -> UserError:
    return UserError(
        f"prepare: a tokenising process was killed near document {name}, perhaps because memory "
        "ran out"
    )


@contextlib.contextmanager
def _worker(kind: str, model: str | Path) -> Iterator[Connection]:
    """Starts a worker and yields its connection; closing the connection ends the worker."""
    # Spawned, not forked: this process may hold threads and locks of other libraries.
    context = multiprocessing.get_context("spawn")
    mine, its = context.Pipe()
    process = context.Process(target=_work, args=(its, kind, model), daemon=True)
    process.start()
    its.close()  # only the worker may hold this end
    try:
        yield mine
    finally:
        mine.close()
        process.join()


def _work(connection: Connection, kind: str, model: str | Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the workers
    batches: queue.SimpleQueue[list[Document]] = queue.SimpleQueue()
    threading.Thread(target=_take_in, args=(connection, batches), daemon=True).start()
    tokenizer = load_tokenizer(kind, model)
    while True:
        connection.send(_encode_all(tokenizer, batches.get()))


def _take_in(connection: Connection, batches: queue.SimpleQueue) -> None:
    """Reads batches while the worker is busy, and ends it when the parent has finished or died."""
    try:
        while True:
            batches.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)
