"""Infini-attention with Triton kernels, as one operation with its backward pass.

Scores, features of queries and A_mem are never written to device memory. For the backward pass the
operation keeps only its inputs, its output with the log-sum-exp of each row, and the memory that
each segment reads. Rotated keys, and in the backward pass rotated queries, exist only while it
runs.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from infini_ds.kernels.infini_attention.reference import Inputs
from infini_ds.kernels.infini_attention.triton.gated_delta_window import GatedDeltaWindow
from infini_ds.kernels.infini_attention.triton.paper_window import PaperWindow
from infini_ds.kernels.infini_attention.triton.window import States, Window, documents_of
from infini_ds.layout import whole_weights
from infini_ds.memory.state import MemoryState

WINDOWS: dict[str, type[Window]] = {
    "linear": PaperWindow,
    "delta": PaperWindow,
    "gated_delta": GatedDeltaWindow,
}
"""By the names of the rules, config.model.KERNEL_RULES."""


def infini_attention_triton(inputs: Inputs) -> tuple[Tensor, MemoryState]:
    """Computes the results of `infini_attention_reference`, for head sizes in TRITON_HEAD_DIMS."""
    q, k, v, w, memory, layout, beta, rule, rotary, previous = inputs
    n = k.shape[2]
    weight = whole_weights(layout, n, k.shape[3])
    if w is not None:
        weight = (weight * w.float().mT).contiguous()
    out, kv, norm = _InfiniAttention.apply(  # type: ignore[misc]
        q,
        k,
        v,
        weight,
        *memory,
        beta,
        previous,
        layout.starts,
        rule,
        *rotary,
        documents_of(layout, n),
    )
    return out, MemoryState(kv, norm)


class _InfiniAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, weight, kv, norm, beta, previous, starts, rule, cos, sin, documents):
        window = WINDOWS[rule](q, k, v, weight, beta, starts, rule, cos, sin, documents, previous)
        states, final, rotated_k = window.write(MemoryState(kv, norm))
        out, log_sum = window.attend(states, rotated_k)
        ctx.save_for_backward(
            q, k, v, weight, beta, previous, starts, cos, sin, out, log_sum, *states
        )
        ctx.rule, ctx.documents = rule, documents
        return out, *final

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_kv, d_norm):
        q, k, v, weight, beta, previous, starts, cos, sin, out, log_sum, *states = ctx.saved_tensors
        window = WINDOWS[ctx.rule](
            q, k, v, weight, beta, starts, ctx.rule, cos, sin, ctx.documents, previous
        )
        d_final = MemoryState(d_kv.contiguous(), d_norm.contiguous())
        gradients = window.backward(States(*states), out, log_sum, d_out.contiguous(), d_final)
        return *gradients, None, None, None, None, None
