"""Chooses how Infini-attention is computed."""

from torch import Tensor

from infini_ds.kernels.backend import uses_triton
from infini_ds.kernels.infini_attention.parallel import infini_attention_parallel
from infini_ds.layout import Layout
from infini_ds.memory import RULES, MemoryState


def infini_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor | None,
    memory: MemoryState,
    layout: Layout,
    beta: Tensor,
    rule: str,
    rotary: tuple[Tensor, Tensor],
) -> tuple[Tensor, MemoryState]:
    """See `infini_attention_reference`: same arguments, same results."""
    if rule not in RULES:
        raise ValueError(f"rule ({rule}) must be one of {', '.join(RULES)}")
    compute = infini_attention_parallel
    if uses_triton(q):
        from infini_ds.kernels.self_check import check

        check(q, k.shape[3], rule)
    if uses_triton(q):
        # Triton cannot be imported everywhere.
        from infini_ds.kernels.infini_attention.triton.op import infini_attention_triton

        compute = infini_attention_triton
    return compute(q, k, v, w, memory, layout, beta, rule, rotary)
