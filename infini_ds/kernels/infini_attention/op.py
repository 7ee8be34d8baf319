"""Chooses the implementation of Infini-attention."""

from torch import Tensor

from infini_ds.kernels.backend import uses_triton
from infini_ds.kernels.infini_attention.parallel import infini_attention_parallel
from infini_ds.kernels.infini_attention.reference import Inputs
from infini_ds.memory import RULES, MemoryState


def infini_attention(inputs: Inputs) -> tuple[Tensor, MemoryState]:
    """Computes the results of `infini_attention_reference` by the fastest way available."""
    if inputs.rule not in RULES:
        raise ValueError(f"rule ({inputs.rule}) must be one of {', '.join(RULES)}")
    compute = infini_attention_parallel
    if uses_triton(inputs.q):
        from infini_ds.kernels.self_check import check

        check(inputs.q, inputs.k.shape[3], inputs.rule, inputs.layout.begins is not None)
    if uses_triton(inputs.q):
        # Triton is not installed everywhere.
        from infini_ds.kernels.infini_attention.triton.op import infini_attention_triton

        compute = infini_attention_triton
    return compute(inputs)
