"""Loss on held-out documents, with the memory on and with it ablated."""

import math
from typing import NamedTuple

import torch

from infini_ds.config import RunConfig
from infini_ds.data.lanes import Plan, held_out_plans
from infini_ds.data.store import Store
from infini_ds.data.windows import Windows, read_windows
from infini_ds.pipeline.engine import InfiniEngine


class Quality(NamedTuple):
    """Loss over held-out tokens, each counted once."""

    loss: float
    """Mean over tokens, nats."""
    perplexity: float
    """exp(loss)."""
    bits_per_byte: float
    """Bits over the bytes of text that the tokens stand for: comparable between tokenizers."""


class HeldOut:
    """The run's evaluation: a finite pass over held-out documents through the pipeline."""

    def __init__(self, config: RunConfig, store: Store, engine: InfiniEngine):
        """Plans it; needs no other rank.

        Raises:
            UserError: a document that will be read holds tokens that the tokenizer does not have.
        """
        self._split = store.split("held_out")
        self._token_bytes = torch.from_numpy(store.tokenizer.token_bytes).long()
        self._segment_length = config.model.segment_length
        self._engine = engine
        self._plans = held_out_plans(
            self._split.lengths,
            config.model.segment_length,
            config.train.window_segments,
            config.train.batch_size,
            config.evaluation.max_segments,
        )
        documents = 1 + max(int(plan.documents.max()) for plan in self._plans)
        store.check_tokens("held_out", documents)
        self.unigram_bits_per_byte = store.unigram_bits_per_byte(documents)
        """Of the tokenizer's unigram baseline on the documents that are read."""

    def evaluate(self, memory: bool) -> Quality:
        """Reads all documents; to be called on all ranks together.

        Args:
            memory: False ablates it: every segment reads an empty memory.
        """
        engine = self._engine
        memories = engine.empty_memories()
        totals = torch.zeros(3, dtype=torch.float64, device=engine.device)
        for plan in self._plans:
            totals[0] += engine.evaluate_window(self._reader(plan, memory, totals), memories)
        loss_sum, tokens, text_bytes = engine.all_sum(totals).tolist()
        loss = loss_sum / tokens
        return Quality(loss, math.exp(min(loss, 700)), loss_sum / math.log(2) / text_bytes)

    def _reader(self, plan: Plan, memory: bool, totals: torch.Tensor):
        def read(micro_batch: int) -> Windows:
            lanes = self._engine.lanes_of(micro_batch)
            windows = read_windows(self._split, plan, lanes, self._segment_length)
            if not memory:
                windows.layout.starts.fill_(True)
            if self._engine.is_last_stage():
                labels = windows.labels[windows.labels >= 0]
                totals[1] += len(labels)
                totals[2] += self._token_bytes[labels].sum()
            return windows

        return read
