"""Measures the loss on held-out documents, with the memory on and ablated."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from infini_ds.config import RunConfig
from infini_ds.data.lanes import Plan, held_out_plans
from infini_ds.data.mixture import Mixture
from infini_ds.data.store import Split, Store
from infini_ds.data.windows import Windows, read_windows
from infini_ds.parallel.engine import Engine


class Quality(NamedTuple):
    """Loss over held-out tokens, each of which counts once."""

    loss: float
    """Mean over tokens, in nats."""
    perplexity: float
    """exp(loss)."""
    bits_per_byte: float
    """Bits per byte of text, which is comparable between tokenizers."""


class _Corpus(NamedTuple):
    """The held-out documents of one store, as far as they are read."""

    split: Split
    plans: list[Plan]
    unigram_bits_per_byte: float
    """The result of the tokenizer's unigram baseline on them."""


class HeldOut:
    """The run's evaluation: a finite pass over held-out documents through the pipeline."""

    def __init__(self, config: RunConfig, data: Mixture, engine: Engine):
        """Plans the evaluation, without other ranks; stores without held-out documents are skipped.

        Raises:
            UserError: a document that will be read holds tokens that the tokenizer does not have.
        """
        self._token_bytes = torch.from_numpy(data.tokenizer.token_bytes).long()
        self._segment_length = config.model.segment_length
        self._engine = engine
        self._corpora = {
            name: _plan(config, store)
            for name, store in data.stores.items()
            if len(store.split("held_out").lengths)
        }

    def evaluate(self) -> dict[str, float]:
        """Reads all documents, with memory and without; must be called on all ranks together.

        Returns:
            Figures by name, under `held_out/`, `held_out_without_memory/` and `held_out_unigram/`:
            each has bits_per_byte, and the first two also have loss and perplexity. They cover all
            corpora together and, in a mixture, each one under its name, as in
            `held_out/NAME/loss`. Empty if nothing is held out.
        """
        if not self._corpora:
            return {}
        figures = {}
        for title, ablated in (("held_out", False), ("held_out_without_memory", True)):
            totals = self._read(ablated)
            parts = dict(zip(self._corpora, totals, strict=True)) | {"": totals.sum(dim=0)}
            for name, part in parts.items():
                for key, value in _quality(part)._asdict().items():
                    figures[figure_name(title, name, key)] = value
        baselines = {name: part.unigram_bits_per_byte for name, part in self._corpora.items()}
        text_bytes = totals[:, 2].numpy()
        baselines[""] = float(np.average([*baselines.values()], weights=text_bytes))
        for name, value in baselines.items():
            figures[figure_name("held_out_unigram", name, "bits_per_byte")] = value
        return figures

    def _read(self, ablated: bool) -> Tensor:
        """Sums losses, tokens and bytes of text for each corpus: [corpora, 3], on the CPU."""
        engine = self._engine
        totals = torch.zeros(len(self._corpora), 3, dtype=torch.float64, device=engine.device)
        for corpus, sums in zip(self._corpora.values(), totals, strict=True):
            memories = engine.empty_memories()
            for plan in corpus.plans:
                read = self._reader(corpus.split, plan, sums)
                sums[0] += engine.evaluate_window(read, memories, ablated)
        return engine.all_sum(totals).cpu()

    def _reader(self, split: Split, plan: Plan, sums: Tensor):
        def read(micro_batch: int) -> Windows:
            lanes = self._engine.lanes_of(micro_batch)
            windows = read_windows(split, plan, lanes, self._segment_length)
            if self._engine.counts_labels:
                labels = windows.labels[windows.labels >= 0]
                sums[1] += len(labels)
                sums[2] += int(self._token_bytes[labels].sum()) * split.byte_scale
            return windows

        return read


def figure_name(title: str, corpus: str, key: str) -> str:
    """Returns the name of a figure of one corpus, or of all together if `corpus` is empty."""
    return "/".join(filter(None, (title, corpus, key)))


def _plan(config: RunConfig, store: Store) -> _Corpus:
    split = store.split("held_out")
    plans = held_out_plans(
        split.lengths,
        config.model.segment_length,
        config.train.window_segments,
        config.train.batch_size,
        config.evaluation.max_segments,
    )
    documents = 1 + max(int(plan.documents.max()) for plan in plans)
    store.check_tokens("held_out", documents)
    return _Corpus(split, plans, store.unigram_bits_per_byte(documents))


def _quality(sums: Tensor) -> Quality:
    loss_sum, tokens, text_bytes = sums.tolist()
    loss = loss_sum / tokens
    return Quality(loss, math.exp(min(loss, 700)), loss_sum / math.log(2) / text_bytes)
