"""Guards the ranges of number types: the type for computing, casts, and results beyond the range.

fp16 ends at 65,504, which sums over many segments exceed. Weights stored in it are therefore
computed in fp32; the memory and its sums are always fp32. No cast to a narrower type silently makes
a number infinite, and no result that is not finite is shown as if it were.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from infini_ds.errors import RunError, UserError


def compute_dtype(stored: torch.dtype) -> torch.dtype:
    """Returns the type to compute in: fp32 for fp16, and every other type itself."""
    return torch.float32 if stored == torch.float16 else stored


def name_of(dtype: torch.dtype) -> str:
    """Returns the type's name in messages and in a config.json, such as float16."""
    return str(dtype).removeprefix("torch.")


def check_finite(tensor: Tensor, what: str) -> None:
    """Checks that all numbers of a tensor are finite.

    Args:
        what: name of the tensor, for the message.

    Raises:
        UserError: a number is not finite.
    """
    if (bad := _not_finite(tensor)) is not None:
        raise UserError(f"{what} holds {bad}; all its numbers must be finite")


def narrowed(tensor: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """Converts a tensor of finite numbers to another type.

    Args:
        what: name of the tensor, for the message.

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
    """A module, or anything else that has its weights."""

    def parameters(self) -> Iterator[Tensor]: ...

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]: ...


@torch.no_grad()
def require_finite(result: Tensor, model: Weighted, what: str) -> None:
    """Checks that a model's result is finite.

    Args:
        what: name of the result with its verb, for the message.

    Raises:
        RunError: it is not; names the weight that is to blame, if there is one.
    """
    if result.isfinite().all():
        return
    for name, weight in model.named_parameters():
        if (bad := _not_finite(weight)) is not None:
            raise RunError(f"{what} not finite: weight {name} of the model holds {bad}")
    dtype = name_of(next(model.parameters()).dtype)
    raise RunError(f"{what} not finite: numbers grow beyond {dtype} in this model")


def _not_finite(tensor: Tensor) -> float | None:
    """Returns a number of the tensor that is not finite, if any; does not copy a large tensor."""
    if tensor.is_meta or not tensor.numel():
        return None
    ends = (end.item() for end in tensor.detach().aminmax())
    return next((end for end in ends if not abs(end) < float("inf")), None)
