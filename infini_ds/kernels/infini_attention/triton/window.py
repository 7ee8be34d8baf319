"""One window's Infini-attention by Triton kernels: what all memory rules share.

A subclass for each kind of rule launches the kernels that write and read the memory.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
import triton
from torch import Tensor

from infini_ds.errors import UserError
from infini_ds.kernels.infini_attention.triton.attend import attend_kernel
from infini_ds.kernels.infini_attention.triton.attend_gradient import (
    earlier_gradient_kernel,
    key_gradient_kernel,
    query_gradient_kernel,
)
from infini_ds.kernels.infini_attention.triton.earlier import NOT_SLIDING, Earlier
from infini_ds.kernels.infini_attention.triton.tuning import Tiles, tiles
from infini_ds.kernels.launch import generation, launch
from infini_ds.layout import Layout, document_begins, document_ends
from infini_ds.memory.state import EPSILON, MemoryState

LARGEST_GRID = 65535
"""CUDA's limit on the grid dimension that runs over segments."""

ROW_PADDING = 128
"""Numbers per row are padded to a multiple of the largest tile, so that they load unmasked."""
READ_FEATURES = 32
"""Number of a query's features that read the memory at a time."""


class Documents(NamedTuple):
    """Where there is more than one document in a segment, int32; None where segments are not
    packed."""

    begins: Tensor | None = None
    """[batch, segments, n], see `document_begins`."""
    ends: Tensor | None = None
    """[batch, segments, n], see `document_ends`."""
    lengths: Tensor | None = None
    """[batch, segments], of the first documents, which alone read the memory."""

    def arguments(self, *names: str) -> dict[str, Any]:
        """Those of a kernel that has these of the fields."""
        found: dict[str, Any] = {name: getattr(self, name) for name in names}
        return found | {"PACKED": self is not NOT_PACKED}


NOT_PACKED = Documents()


def documents_of(layout: Layout, n: int) -> Documents:
    begins, ends = document_begins(layout), document_ends(layout)
    if begins is None or ends is None:
        return NOT_PACKED
    return Documents(begins.contiguous(), ends.contiguous(), layout.lengths.contiguous())


class States(NamedTuple):
    """The memories that segments read; batch and segments are flattened here and below."""

    kv: Tensor
    """[segments, kv_heads, d, d] fp32."""
    norm: Tensor
    """[segments, kv_heads, d] fp32. By rules without a norm, the largest magnitude in each row of
    kv, which also tells whether anything is stored."""
    damping: Tensor
    """[segments, kv_heads] fp32, see `delta_damping`; empty unless the rule is delta."""


class ReadGradients(NamedTuple):
    """What the gradient of the read gives."""

    dq: Tensor
    """[batch, segments, n, heads, d], the read's part alone."""
    rotated_q: Tensor
    """[segments, heads, n, d]."""
    along: Tensor
    """[segments, heads, padded_n] fp32, see `memory_gradient`."""
    d_beta: Tensor
    """[segments, heads, n] fp32."""
    d_found: tuple[Tensor, ...]
    """Of the memory before each segment, by tensor."""


class WriteGradients(NamedTuple):
    """What the gradient of the write gives."""

    dk: Tensor
    """[batch, segments, n, kv_heads, d], the write's part alone, as dv."""
    dv: Tensor
    d_weight: Tensor
    """[batch, segments, kv_heads, n] fp32."""
    rotated_k: Tensor
    """[segments, kv_heads, n, d]."""
    d_incoming: MemoryState


class Window(ABC):
    """Launches the kernels on the inputs of one window."""

    normalized: ClassVar[bool]
    """Whether reads are RMS-normalised instead of divided by the norm."""

    def __init__(
        self, q, k, v, weight, beta, starts, rule, cos, sin, documents=NOT_PACKED, previous=None
    ):
        self.batch, self.segments, self.n, self.heads, self.d = q.shape
        self.padded_n = triton.cdiv(self.n, ROW_PADDING) * ROW_PADDING
        self.kv_heads = k.shape[3]
        self.rows = self.batch * self.segments
        if self.rows > LARGEST_GRID:
            raise UserError(
                f"kernels.backend: triton reads at most {LARGEST_GRID:,} segments at once, not "
                f"{self.rows:,}; raise train.chunks or lower train.micro_batch_size"
            )
        self.q, self.k, self.v = (_rows_in_place(x) for x in (q, k, v))
        if self.n * max(x.stride(1) for x in (self.q, self.k, self.v)) >= 2**31:
            raise UserError(
                f"kernels.backend: triton cannot read segments as long as {self.n:,} tokens; lower "
                "model.segment_length, or let torch compute"
            )
        self.weight = weight
        self.beta, self.rule = beta, rule
        self.documents = documents
        self.starts = starts.contiguous().view(torch.uint8)
        self.earlier, sliding = None, NOT_SLIDING
        if previous is not None:
            (first_cos, cos), (first_sin, sin) = (
                table.tensor_split((previous.shape[2],)) for table in (cos, sin)
            )
            self.earlier = Earlier(
                previous, q.dtype, first_cos, first_sin, self.n, documents.lengths
            )
            sliding = self.earlier.arguments()
        self.sliding = sliding
        self.cos, self.sin = cos.contiguous(), sin.contiguous()
        self.precision = "ieee" if q.dtype == torch.float32 else "tf32"  # of products in fp32
        self.scale = math.log2(math.e) / math.sqrt(self.d)

    @abstractmethod
    def write(self, incoming: MemoryState) -> tuple[States, MemoryState, Tensor]:
        """Returns the memory before each segment, the memory after the window, and the keys with
        rotary positions, [segments, kv_heads, n, d]."""

    @abstractmethod
    def read_gradients(
        self, states: States, out: Tensor, log_sum: Tensor, d_out: Tensor
    ) -> ReadGradients:
        """Computes the gradients that the read of the memory sends on."""

    @abstractmethod
    def write_gradients(
        self, states: States, d_found: tuple[Tensor, ...], d_final: MemoryState
    ) -> WriteGradients:
        """Computes the gradients that the write sends on.

        Args:
            d_found: gradients of the memory before each segment, which may be changed in place.
            d_final: those of the memory after the window.
        """

    def attend(self, states: States, rotated_k: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the output [batch, segments, n, heads, d] and the scores' log-sum-exp by row."""
        out = torch.empty(
            self.batch, self.segments, self.n, self.heads, self.d,
            dtype=self.q.dtype, device=self.q.device,
        )  # fmt: skip
        # Infinity gives padded rows the weight exp2(-inf) = 0.
        log_sum = torch.full((self.rows, self.heads, self.padded_n), math.inf, device=self.q.device)
        size = self.tiles("normalized_attend" if self.normalized else "attend")
        self.launch(
            attend_kernel, self.grid(size.rows, self.heads), size.options,
            q=self.q, rotated_k=rotated_k, v=self.v, kv=states.kv, norm=states.norm,
            beta=self.beta, cos=self.cos, sin=self.sin, out=out, log_sum=log_sum,
            **strides("q", self.q), **strides("v", self.v), n=self.n,
            padded_n=self.padded_n, heads=self.heads,
            kv_heads=self.kv_heads, scale=self.scale, EPSILON=EPSILON,
            NORMALIZED=self.normalized, D=self.d, BLOCK_M=size.rows, BLOCK_N=size.columns,
            BLOCK_D=READ_FEATURES, **self.documents.arguments("begins", "lengths"),
            **self.sliding,
        )  # fmt: skip
        return out, log_sum

    def backward(
        self, states: States, out: Tensor, log_sum: Tensor, d_out: Tensor, d_final: MemoryState
    ) -> tuple[Tensor | None, ...]:
        """Returns the gradients of q, k, v, weight, the incoming kv and norm, beta, and the segment
        before each one, None where no window slides."""
        read = self.read_gradients(states, out, log_sum, d_out)
        dk, dv, d_weight, rotated_k, d_incoming = self.write_gradients(
            states, read.d_found, d_final
        )
        local: dict[str, Any] = {
            "rotated_q": read.rotated_q, "rotated_k": rotated_k, "v": self.v, "norm": states.norm,
            "beta": self.beta, "cos": self.cos, "sin": self.sin, "d_out": d_out,
            "log_sum": log_sum, "along": read.along, **strides("v", self.v), "n": self.n,
            "padded_n": self.padded_n, "kv_heads": self.kv_heads, "scale": self.scale,
            "LN_2": math.log(2), "D": self.d,
        }  # fmt: skip
        size = self.tiles("query_gradient")
        self.launch(
            query_gradient_kernel, self.grid(size.rows, self.heads), size.options,
            dq=read.dq, heads=self.heads, BLOCK_M=size.rows, BLOCK_N=size.columns, **local,
            **self.documents.arguments("begins", "lengths"), **self.sliding,
        )  # fmt: skip
        size = self.tiles("key_gradient")
        self.launch(
            key_gradient_kernel, self.grid(size.columns, self.kv_heads), size.options,
            dk=dk, dv=dv, GROUP=self.heads // self.kv_heads, BLOCK_M=size.rows,
            BLOCK_N=size.columns, **local,
            **self.documents.arguments("begins", "ends", "lengths"),
        )  # fmt: skip
        d_beta = read.d_beta.sum(dim=(0, 2)).to(self.beta.dtype)
        d_previous = None
        if self.earlier is not None:
            d_previous = self._earlier_gradient(self.earlier, local)
        return read.dq, dk, dv, d_weight, *d_incoming, d_beta, d_previous

    def _earlier_gradient(self, earlier: Earlier, local: dict[str, Any]) -> Tensor:
        """Launches `earlier_gradient_kernel`; returns the gradient of the segment before each one.

        Args:
            local: arguments of the kernels of local attention.
        """
        dk, dv = torch.empty_like(earlier.k), torch.empty_like(earlier.v)
        size = self.tiles("key_gradient")
        names = (
            "rotated_q", "norm", "beta", "d_out", "log_sum", "along", "n", "padded_n", "kv_heads",
            "scale", "LN_2", "D",
        )  # fmt: skip
        self.launch(
            earlier_gradient_kernel,
            (triton.cdiv(earlier.width, size.columns), self.kv_heads, self.rows), size.options,
            **{name: local[name] for name in names}, earlier_k=earlier.k, earlier_v=earlier.v,
            earlier_ends=earlier.ends, width=earlier.width, d_earlier_k=dk, d_earlier_v=dv,
            GROUP=self.heads // self.kv_heads, BLOCK_M=size.rows, BLOCK_N=size.columns,
            **self.documents.arguments("lengths"),
        )  # fmt: skip
        return earlier.gradient(dk, dv)

    def walk(self, name: str, kernel: Any, **arguments: Any) -> None:
        """Launches `delta_kernel` or `delta_gradient_kernel`."""
        size = self.tiles(name)
        self.launch(
            kernel, (self.d // size.columns, self.batch * self.kv_heads), size.options,
            **arguments, starts=self.starts, segments=self.segments, kv_heads=self.kv_heads,
            PRECISION=self.precision, D=self.d, BLOCK_V=size.columns,
        )  # fmt: skip

    def launch(
        self, kernel: Any, grid: tuple[int, ...], options: dict[str, int], **arguments: Any
    ) -> None:
        """Launches a kernel; all launches of a window go through here."""
        launch(kernel, grid, options, **arguments)

    def grid(self, size: int, heads: int) -> tuple[int, int, int]:
        """One program per `size` tokens of each head of each segment."""
        return triton.cdiv(self.n, size), heads, self.rows

    def tiles(self, kernel: str) -> Tiles:
        """The tiles of a kernel on this device."""
        packed, sliding = self.documents is not NOT_PACKED, self.earlier is not None
        device = generation(self.q.device)
        return tiles(kernel, self.d, self.q.itemsize, device, packed, sliding)


def _rows_in_place(x: Tensor) -> Tensor:
    """Flattens batch and segments of [batch, segments, n, heads, d], without a copy if possible."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, segments = x.shape[:2]
    in_place = batch == 1 or x.stride(0) == segments * x.stride(1)
    return (x if in_place else x.contiguous()).flatten(0, 1)


def strides(name: str, x: Tensor) -> dict[str, int]:
    """Returns the strides of x [segments, n, heads, d] under the kernels' names for them."""
    return dict(zip((f"{name}_segment", f"{name}_row", f"{name}_head"), x.stride(), strict=False))
