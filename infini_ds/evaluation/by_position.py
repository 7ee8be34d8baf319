"""Measures, on one device, the loss of whole documents by the position of each token."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from infini_ds.data.lanes import Plan
from infini_ds.data.store import Split
from infini_ds.data.windows import Windows, read_windows
from infini_ds.evaluation.token_kinds import KINDS
from infini_ds.memory import MemoryState
from infini_ds.model.head import token_losses
from infini_ds.model.memory import Memory
from infini_ds.model.transformer import InfiniTransformer
from infini_ds.model.write_gate import WriteStats
from infini_ds.system.ranges import require_finite


class Totals(NamedTuple):
    """Sums over the tokens of each bin of positions, or of each kind; all are fp64 [bins]."""

    loss: Tensor
    """In nats."""
    tokens: Tensor
    bytes: Tensor
    """Bytes of text that the tokens stand for."""


@torch.no_grad()
def read_documents(
    model: InfiniTransformer,
    split: Split,
    plans: list[Plan],
    bins: list[int],
    connected: bool,
    token_bytes: np.ndarray,
    loss_chunk_tokens: int,
    report: Callable[[Plan], None],
    kinds: Sequence[np.ndarray] = (),
) -> tuple[Totals, Totals]:
    """Reads documents and sums their losses, by position and by kind.

    Args:
        model: the model, which is left in evaluation mode.
        split: holds the documents.
        plans: one pass over the documents, see `held_out_plans`.
        bins: the positions in a document at which bins begin; the first is 0.
        connected: if False, every segment is a document of its own.
        token_bytes: [vocab_size], the bytes of text that each token stands for.
        loss_chunk_tokens: number of tokens whose logits exist at the same time; 0 chooses one that
            suits the device.
        report: called with each window after it has been read.
        kinds: see `token_kinds`; if empty, the sums by kind are zeros.

    Raises:
        RunError: a loss is not finite.
    """
    model.eval()
    n, lanes = model.config.segment_length, len(plans[0].lengths)
    parameter = next(model.parameters())
    layers = Memory.empty(model.config, lanes, parameter.device, parameter.dtype).layers()
    text_bytes = torch.from_numpy(token_bytes).double() * split.byte_scale
    sums = torch.zeros(3, len(bins), dtype=torch.float64)
    by_kind = torch.zeros(3, len(KINDS), dtype=torch.float64)
    if kinds:
        flat_kinds = np.concatenate(kinds)
        begins = np.cumsum([0, *map(len, kinds)])
    for plan in plans:
        windows = windows_of(split, plan, n, connected)
        losses, layers, _ = window_losses(model, windows, layers, loss_chunk_tokens)
        losses = losses.cpu()
        valid = windows.labels >= 0
        require_finite(losses[valid], model, "the losses of the documents are")
        positions = torch.from_numpy(plan.offsets[..., None] + np.arange(n)).flatten(1)
        index = bin_of(positions[valid], bins)
        labels = windows.labels[valid]
        one = torch.ones(len(labels), dtype=torch.float64)
        found = torch.stack((losses[valid].double(), one, text_bytes[labels]))
        sums.index_add_(1, index, found)
        if kinds:
            own = begins[np.repeat(plan.documents, n, axis=1)[valid.numpy()]]
            index = torch.from_numpy(flat_kinds[own + positions[valid].numpy()]).long()
            by_kind.index_add_(1, index, found)
        report(plan)
    return Totals(*sums), Totals(*by_kind)


def windows_of(split: Split, plan: Plan, segment_length: int, connected: bool) -> Windows:
    """Returns the windows of all lanes; unless `connected`, every segment starts a document."""
    windows = read_windows(split, plan, range(len(plan.lengths)), segment_length)
    if not connected:
        windows.layout.starts.fill_(True)
    return windows


def window_losses(
    model: InfiniTransformer,
    windows: Windows,
    memory: list[MemoryState],
    loss_chunk_tokens: int,
) -> tuple[Tensor, list[MemoryState], list[WriteStats]]:
    """Reads one window of every lane as training does.

    Args:
        memory: the memory of each layer before the window.
        loss_chunk_tokens: number of tokens whose logits exist at the same time; 0 chooses one that
            suits the device.

    Returns:
        The loss of each token, [lanes, segments x n] in nats and 0 where there is no label; the
        memory of each layer after the window; and statistics of each layer's writes, see
        `read_window`.
    """
    device = next(model.parameters()).device
    layout = windows.layout.map(lambda part: part.to(device))
    tokens, labels = windows.tokens.to(device), windows.labels.to(device)
    hidden, memory, writes = model.read_window(tokens, layout, memory)
    return token_losses(hidden, *model.head(), labels, loss_chunk_tokens), memory, writes


def position_bins(first: int, longest: int) -> list[int]:
    """Returns where bins of positions begin: 0, first, 2 first, 4 first, ... below `longest`."""
    bins = [0]
    while max(first, 2 * bins[-1]) < longest:
        bins.append(max(first, 2 * bins[-1]))
    return bins


def bin_of(positions: Tensor, bins: list[int]) -> Tensor:
    """Returns the index of the bin that each position falls into; both are [tokens]."""
    return torch.bucketize(positions, torch.tensor(bins[1:]), right=True)


def means(totals: Totals) -> dict[str, Any]:
    """Returns nats per token and bits per byte, over all tokens and over those of each bin."""
    everything = _means(*(float(part.sum()) for part in totals))
    return {**everything, "by_position": parts_of(totals)}


def parts_of(totals: Totals) -> list[dict[str, Any]]:
    """Returns nats per token and bits per byte over the tokens of each bin or kind."""
    return [_means(*part) for part in zip(*(part.tolist() for part in totals), strict=True)]


def _means(loss: float, tokens: float, text_bytes: float) -> dict[str, Any]:
    bits = loss / math.log(2)
    return {
        "loss": loss / tokens if tokens else None,
        "bits_per_byte": bits / text_bytes if text_bytes else None,
        "tokens": int(tokens),
    }
