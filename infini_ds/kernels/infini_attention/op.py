"""Chooses the implementation of Infini-attention."""

from torch import Tensor

from infini_ds.config.model import KERNEL_RULES
from infini_ds.kernels.backend import uses_triton
from infini_ds.kernels.infini_attention.parallel import (
    infini_attention_parallel,
    memory_before_part,
)
from infini_ds.kernels.infini_attention.reference import Inputs
from infini_ds.memory import RULES, MemoryState
from infini_ds.memory.hand_on import Exchange


def infini_attention(
    inputs: Inputs, exchange: Exchange | None = None
) -> tuple[Tensor, MemoryState]:
    """Computes the results of `infini_attention_reference` by the fastest way available.

    Args:
        exchange: if given, other ranks have the other parts of the window, as in
            `infini_attention_parallel`.
    """
    if inputs.rule not in RULES:
        raise ValueError(f"rule ({inputs.rule}) must be one of {', '.join(RULES)}")
    fits = inputs.rule in KERNEL_RULES
    if fits and uses_triton(inputs.q):
        from infini_ds.kernels.self_check import check

        packed, sliding = inputs.layout.begins is not None, inputs.previous is not None
        check(inputs.q, inputs.k.shape[3], inputs.rule, packed, sliding)
    if fits and uses_triton(inputs.q):  # it may just have been found at fault
        # Triton is not installed everywhere.
        from infini_ds.kernels.infini_attention.triton.op import infini_attention_triton

        if exchange is None:
            return infini_attention_triton(inputs)
        before, final = memory_before_part(inputs, exchange)
        return infini_attention_triton(inputs._replace(memory=before))[0], final
    return infini_attention_parallel(inputs, exchange)
