"""Implements `infini-ds evaluate`: the loss on documents, with the memory on and ablated.

The documents are the held-out ones that the run itself evaluates, or any others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from infini_ds.config import DataConfig
from infini_ds.data.documents import Corpus
from infini_ds.data.encoding import encode
from infini_ds.data.lanes import Plan, held_out_plans
from infini_ds.data.restored import loss_of
from infini_ds.data.store import Split, Store
from infini_ds.errors import UserError
from infini_ds.evaluation import documents_report as report
from infini_ds.evaluation import results as outcome
from infini_ds.evaluation.by_position import means, position_bins, read_documents
from infini_ds.model.block import memory_ablated
from infini_ds.model.reading import CALL_TOKENS
from infini_ds.runs.checkpoint import Loaded, state_of
from infini_ds.runs.export import load_for_command
from infini_ds.system.compute_type import place
from infini_ds.system.console import Console
from infini_ds.system.progress import ReadingProgress


class _Reading(NamedTuple):
    """Limits on what is read at the same time: those of the run, or else these defaults."""

    window_segments: int = 8
    lanes: int = 8
    loss_chunk_tokens: int = 0


def run(
    path: str,
    step: int | None,
    documents: Sequence[str],
    corpus: str,
    json_path: str | None,
    plot: str | None,
) -> None:
    """Evaluates a model and reports the results.

    Args:
        path, step: see `load_model`.
        documents: files as in data.files; if empty, the held-out split of the run's store is read,
            up to the run's evaluation.max_segments.
        corpus: for a run trained on a mixture, the corpus whose held-out split is read; else empty.
        json_path: where to write the figures as well, if anywhere.
        plot: where to write the curve; by default evaluation.png in the run's directory, or in the
            working directory for an export.

    Raises:
        UserError: there is no such model, there are no documents, or a file cannot be written.
    """
    console = Console()
    loaded = load_for_command(path, step, console)
    places = outcome.places(loaded, "evaluate", "evaluation.png", json_path, plot)
    model, n = loaded.model, loaded.config.model.segment_length
    reading = _reading(loaded)
    if documents:
        if corpus:
            raise UserError(f"--corpus {corpus}: is for held-out documents; leave out --documents")
        source: list[str] | str = list(documents)
        split, lost = _encoded(loaded, documents)
        for line in lost:
            console.print(line)
        plans = _plans(split.lengths, n, reading, max_segments=0)
    elif loaded.run is None:
        raise UserError(f"{path}: is an export, without held-out documents; name --documents")
    else:
        store = _store_of(loaded, _data_of(loaded.run.data, corpus), corpus)
        source, split = str(store.path), store.split("held_out")
        plans = _plans(split.lengths, n, reading, loaded.run.evaluation.max_segments)
        store.check_tokens("held_out", _count(plans))
    count = _count(plans)
    bins = position_bins(n, int(split.lengths[:count].max()) - 1)
    place(model, console)
    tokens = 2 * sum(plan.num_tokens for plan in plans)
    results, done = {}, 0
    with ReadingProgress(console, "evaluate", tokens, "tokens") as progress:

        def read(plan: Plan) -> None:
            nonlocal done
            done += plan.num_tokens
            progress.update(done, plan.num_tokens)

        for name, ablated in (("with_memory", False), ("ablated", True)):
            with memory_ablated(model.blocks, ablated):
                totals, _ = read_documents(
                    model, split, plans, bins, True, loaded.tokenizer.token_bytes,
                    reading.loss_chunk_tokens, read,
                )  # fmt: skip
            results[name] = means(totals)
        rate = progress.tokens_per_second
    setup = {
        "checkpoint": str(loaded.checkpoint),
        "step": loaded.step,
        "source": source,
        "documents": count,
        "segment_length": n,
        "tokens_per_second": rate,
        "bins": bins,
    }
    figures = report.figures(setup, results)
    outcome.write(report.results(figures), places, console)


def _data_of(data: DataConfig, corpus: str) -> DataConfig:
    """Returns the settings of the corpus whose held-out documents are read."""
    if corpus not in data.corpora:
        names = ", ".join(filter(None, data.corpora))
        right = f"must be one of the run's mixture: {names}" if names else "the run has no mixture"
        raise UserError(f"--corpus {corpus!r}: {right}")
    return data.corpora[corpus]


def _store_of(loaded: Loaded, data: DataConfig, corpus: str) -> Store:
    """Opens the store of a corpus and checks that the run was trained on it."""
    try:
        store = Store.open(data.store)
    except UserError as error:
        raise UserError(f"{error}, or name --documents") from None
    state = state_of(loaded.checkpoint)
    had = state.get("stores", {"": state.get("store")})  # earlier versions kept one for all
    if had.get(corpus, store.fingerprint) != store.fingerprint:
        raise UserError(
            f"data.store {store.path}: is not what checkpoint {loaded.checkpoint} was trained on; "
            "put that there, or name --documents"
        )
    return store


def _encoded(loaded: Loaded, files: Sequence[str]) -> tuple[Split, list[str]]:
    """Reads and tokenizes files as the run's config would; also returns lines on what was lost.

    An export has no such config; its documents are read with default settings.
    """
    data = loaded.run.data if loaded.run else DataConfig(store="")
    settings = {"source": "files", "files": list(files), "max_documents": 0}
    try:
        corpus = Corpus(data.model_copy(update=settings))
        encoded = [encode(loaded.tokenizer, each.text, each.spans) for each in corpus]
    except UserError as error:
        raise UserError(str(error).replace("data.files", "--documents", 1)) from None
    if not encoded:
        raise UserError(f"--documents {' '.join(files)}: no text in them")
    tokens = [document.tokens for document in encoded]
    offsets = np.cumsum([0, *map(len, tokens)], dtype=np.int64)
    text_bytes = sum(document.text_bytes for document in encoded)
    token_bytes = sum(document.restored.token_bytes for document in encoded)
    split = Split(np.concatenate(tokens), offsets, None, text_bytes, token_bytes)
    lost = loss_of((document.restored, document.text_bytes) for document in encoded)
    return split, corpus.skipped.lines() + lost


def _count(plans: list[Plan]) -> int:
    """Returns how many documents are read, counting from the first one."""
    return 1 + max(int(plan.documents.max()) for plan in plans)


def _reading(loaded: Loaded) -> _Reading:
    if loaded.run is None:
        return _Reading()
    train = loaded.run.train
    return _Reading(train.window_segments, train.batch_size, train.loss_chunk_tokens)


def _plans(lengths: np.ndarray, n: int, reading: _Reading, max_segments: int) -> list[Plan]:
    """Plans one pass over documents, in windows of a bounded number of segments of `n` tokens."""
    window = max(1, min(reading.window_segments, CALL_TOKENS // n))
    # With more lanes, most of them would wait for the one that reads the longest document.
    lanes = int(lengths.sum() // max(lengths.max(initial=0), 1))
    lanes = max(1, min(reading.lanes, lanes, CALL_TOKENS // (window * n)))
    return held_out_plans(lengths, n, window, lanes, max_segments)
