"""The output head, and a loss that never holds the logits of a whole window."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from infini_ds.config import ModelConfig
from infini_ds.kernels.fused import fused
from infini_ds.layout import IGNORE_INDEX

_GPU_LOGITS = 2**28
"""Logits of a chunk on a GPU, half a GiB in bf16. With smaller chunks the GPU would wait for the
host, which has to launch each of them."""
_CPU_TOKENS = 1024


class Head(nn.Module):
    """Projects to the vocabulary with a weight that is not shared with the embedding."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.vocab_size)) if config.head_bias else None

    def forward(self, hidden: Tensor) -> Tensor:
        """Maps [batch, length, hidden_size] to logits [batch, length, vocab_size]."""
        return F.linear(hidden, self.weight, self.bias)


def token_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    chunk_tokens: int,
    norm: nn.Module | None = None,
) -> Tensor:
    """Computes each token's cross-entropy in fp32, which is 0 where the label is IGNORE_INDEX.

    Args:
        hidden: [batch, length, hidden_size].
        weight, bias: parameters of the head.
        labels: [batch, length].
        chunk_tokens: number of tokens whose logits exist at the same time, see `loss_chunk`. If
            there is more than one chunk, the backward pass recomputes the logits.
        norm: applied to the hidden states first, and recomputed with the logits.

    Returns:
        [batch, length].
    """
    rows = hidden.flatten(0, 1)
    targets = labels.flatten()
    chunk_tokens = loss_chunk(chunk_tokens, len(weight), hidden.device.type)
    chunks = zip(rows.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
    if len(rows) <= chunk_tokens or not torch.is_grad_enabled():
        losses = [_chunk_losses(row, norm, weight, bias, target) for row, target in chunks]
    else:
        losses = [
            checkpoint(
                _chunk_losses, row, norm, weight, bias, target,
                use_reentrant=False, preserve_rng_state=False,
            )
            for row, target in chunks
        ]  # fmt: skip
    return torch.cat(losses).view_as(labels)


def loss_chunk(tokens: int, vocab_size: int, device: str) -> int:
    """Returns the tokens in a chunk of the loss: `tokens`, or if 0, what suits the device type."""
    return tokens or (_CPU_TOKENS if device == "cpu" else max(1, _GPU_LOGITS // vocab_size))


def _chunk_losses(
    rows: Tensor, norm: nn.Module | None, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> Tensor:
    rows = rows if norm is None else norm(rows)
    return cross_entropy(F.linear(rows, weight, bias), targets)


@fused
def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Maps logits [rows, vocab_size] and targets [rows] to fp32 losses [rows], 0 for
    IGNORE_INDEX."""
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="none")
