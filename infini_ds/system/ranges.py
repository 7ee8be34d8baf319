"""The ranges of number types: in which weights are computed, casts, and results beyond them.

fp16 ends at 65,504, below what sums over many segments reach. So what is stored in it is computed
in fp32; the memory and its sums are fp32 always. No cast to a narrower type makes a number infinite
in silence, and no result that is not finite is shown as one.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from infini_ds.errors import RunError, UserError


def compute_dtype(stored: torch.dtype) -> torch.dtype:
    """The type in which numbers of a type are computed: all in their own, but fp16 in fp32."""
    return torch.float32 if stored == torch.float16 else stored


def name_of(dtype: torch.dtype) -> str:
    """As it is written in messages and in a config.json, such as float16."""
    return str(dtype).removeprefix("torch.")


def check_finite(tensor: Tensor, what: str) -> None:
    """Whether all numbers of a tensor are finite.

    Args:
        what: it is, for the message.

    Raises:
        UserError: one is not.
    """
    if (bad := _not_finite(tensor)) is not None:
        raise UserError(f"{what} holds {bad}; all its numbers must be finite")


def narrowed(tensor: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """A tensor of finite numbers in another type.

    Args:
        what: it is, for the message.

    Raises:
        UserError: a number is not finite, or is beyond the range of that type.
    """
    cast = tensor.to(dtype)
    largest = torch.finfo(dtype).max
    if largest < torch.finfo(tensor.dtype).max and _not_finite(cast) is not None:
        check_finite(tensor, what)
        beyond = tensor[~cast.isfinite()][0].item()
        raise UserError(f"{what} holds {beyond:g}; in {name_of(dtype)} at most {largest:g} fits")
    return cast


class Weighted(Protocol):
    """A module, or what stands in for one, as far as its weights go."""

    def parameters(self) -> Iterator[Tensor]: ...

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]: ...


@torch.no_grad()
def require_finite(result: Tensor, model: Weighted, what: str) -> None:
    """Whether what a model computed is finite.

    Args:
        what: it is, for the message, with its verb.

    Raises:
        RunError: it is not; names the weight that is to blame, where one is.
    """
    if result.isfinite().all():
        return
    for name, weight in model.named_parameters():
        if (bad := _not_finite(weight)) is not None:
            raise RunError(f"{what} not finite: weight {name} of the model holds {bad}")
    dtype = name_of(next(model.parameters()).dtype)
    raise RunError(f"{what} not finite: numbers grow beyond {dtype} in this model")


def _not_finite(tensor: Tensor) -> float | None:
    """A number of the tensor that is not finite, if it has one; makes no copy of a large one."""
    if tensor.is_meta or not tensor.numel():
        return None
    ends = (end.item() for end in tensor.detach().aminmax())
    return next((end for end in ends if not abs(end) < float("inf")), None)
