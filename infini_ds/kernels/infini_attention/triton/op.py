"""Infini-attention with Triton kernels, as one operation with its backward pass.

Scores, sigma(q), sigma(k) and A_mem are never written to device memory. For the backward pass the
operation keeps only its inputs, its output with the log-sum-exp of each row, and the memory that
each segment reads. Rotated keys, and in the backward pass rotated queries, exist only while it
runs.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from infini_ds.errors import UserError
from infini_ds.kernels.infini_attention.reference import Inputs
from infini_ds.kernels.infini_attention.triton.attend import attend_kernel
from infini_ds.kernels.infini_attention.triton.attend_gradient import (
    key_gradient_kernel,
    query_gradient_kernel,
)
from infini_ds.kernels.infini_attention.triton.delta import (
    damping_kernel,
    delta_gradient_kernel,
    delta_kernel,
    overlap_gradient_kernel,
    overlap_kernel,
)
from infini_ds.kernels.infini_attention.triton.memory_gradient import (
    read_gradient_kernel,
    write_gradient_kernel,
)
from infini_ds.kernels.infini_attention.triton.scan import scan_kernel
from infini_ds.kernels.infini_attention.triton.sums import sums_kernel
from infini_ds.kernels.infini_attention.triton.tuning import Tiles, tiles
from infini_ds.kernels.launch import generation, launch
from infini_ds.layout import Layout, document_begins, document_ends, whole_weights
from infini_ds.memory.state import EPSILON, MemoryState

LARGEST_GRID = 65535
"""CUDA's limit on the grid dimension that runs over segments."""

ROW_PADDING = 128
"""Numbers per row are padded to a multiple of the largest tile, so that they load unmasked."""
READ_FEATURES = 32
"""Number of a query's features that read the memory at a time."""
SCAN_BLOCK = 1024
"""How many numbers of a state one program carries from segment to segment."""


def infini_attention_triton(inputs: Inputs) -> tuple[Tensor, MemoryState]:
    """Computes the results of `infini_attention_reference`, for head sizes in TRITON_HEAD_DIMS."""
    q, k, v, w, memory, layout, beta, rule, rotary = inputs
    n = k.shape[2]
    weight = whole_weights(layout, n, k.shape[3])
    if w is not None:
        weight = (weight * w.float().mT).contiguous()
    out, kv, norm = _InfiniAttention.apply(  # type: ignore[misc]
        q, k, v, weight, *memory, beta, layout.starts, rule, *rotary, _documents(layout, n)
    )
    return out, MemoryState(kv, norm)


class _InfiniAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, weight, kv, norm, beta, starts, rule, cos, sin, documents):
        window = _Window(q, k, v, weight, beta, starts, rule, cos, sin, documents)
        states, final, rotated_k = window.write(MemoryState(kv, norm))
        out, log_sum = window.attend(states, rotated_k)
        ctx.save_for_backward(q, k, v, weight, beta, starts, cos, sin, out, log_sum, *states)
        ctx.rule, ctx.documents = rule, documents
        return out, *final

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_kv, d_norm):
        q, k, v, weight, beta, starts, cos, sin, out, log_sum, *states = ctx.saved_tensors
        window = _Window(q, k, v, weight, beta, starts, ctx.rule, cos, sin, ctx.documents)
        d_final = MemoryState(d_kv.contiguous(), d_norm.contiguous())
        gradients = window.backward(_States(*states), out, log_sum, d_out.contiguous(), d_final)
        return *gradients, None, None, None, None, None


class _Documents(NamedTuple):
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
        return found | {"PACKED": self is not _NOT_PACKED}


_NOT_PACKED = _Documents()


def _documents(layout: Layout, n: int) -> _Documents:
    begins, ends = document_begins(layout), document_ends(layout)
    if begins is None or ends is None:
        return _NOT_PACKED
    return _Documents(begins.contiguous(), ends.contiguous(), layout.lengths.contiguous())


class _States(NamedTuple):
    """The memories that segments read; batch and segments are flattened here and below."""

    kv: Tensor
    """[segments, kv_heads, d, d] fp32."""
    norm: Tensor
    """[segments, kv_heads, d] fp32."""
    damping: Tensor
    """[segments, kv_heads] fp32, see `delta_damping`; empty unless the rule is delta."""


class _Window:
    """Launches the kernels on the inputs of one window."""

    def __init__(self, q, k, v, weight, beta, starts, rule, cos, sin, documents=_NOT_PACKED):
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
        self.cos, self.sin = cos.contiguous(), sin.contiguous()
        self.scale = math.log2(math.e) / math.sqrt(self.d)

    def write(self, incoming: MemoryState) -> tuple[_States, MemoryState, Tensor]:
        """Returns the memory before each segment, the memory after the window, and the keys with
        rotary positions, [segments, kv_heads, n, d]."""
        rotated_k = self.k.new_empty(self.rows, self.kv_heads, self.n, self.d)
        kv, norm = self._sums(self.k, self.v, self.weight, self.weight, rotated_k)
        incoming = MemoryState(*(x.contiguous() for x in incoming))
        if self.rule == "linear":
            nothing = norm.new_empty(0)
            final = MemoryState(self._scan(kv, incoming.kv), self._scan(norm, incoming.norm))
            return _States(kv, norm, nothing), final, rotated_k
        added_norm = norm.clone()
        final_norm = self._scan(norm, incoming.norm)
        overlaps = self._overlaps(norm)
        damping = norm.new_empty(self.rows, self.kv_heads)
        launch(
            damping_kernel, (self.kv_heads, self.rows), {"num_warps": 8, "num_stages": 1},
            overlaps=overlaps, added_norm=added_norm, damping=damping, kv_heads=self.kv_heads,
            EPSILON=EPSILON, D=self.d,
        )  # fmt: skip
        final_kv = torch.empty_like(incoming.kv)
        self._walk(
            "delta", delta_kernel, overlaps=overlaps, damping=damping, kv=kv,
            incoming=incoming.kv, final=final_kv,
        )  # fmt: skip
        return _States(kv, norm, damping), MemoryState(final_kv, final_norm), rotated_k

    def attend(self, states: _States, rotated_k: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the output [batch, segments, n, heads, d] and the scores' log-sum-exp by row."""
        out = torch.empty(
            self.batch, self.segments, self.n, self.heads, self.d,
            dtype=self.q.dtype, device=self.q.device,
        )  # fmt: skip
        # Infinity gives padded rows the weight exp2(-inf) = 0.
        log_sum = torch.full((self.rows, self.heads, self.padded_n), math.inf, device=self.q.device)
        size = self._tiles("attend")
        launch(
            attend_kernel, self._grid(size.rows, self.heads), size.options,
            q=self.q, rotated_k=rotated_k, v=self.v, kv=states.kv, norm=states.norm,
            beta=self.beta, cos=self.cos, sin=self.sin, out=out, log_sum=log_sum,
            **_strides("q", self.q), **_strides("v", self.v), n=self.n,
            padded_n=self.padded_n, heads=self.heads,
            kv_heads=self.kv_heads, scale=self.scale, EPSILON=EPSILON, D=self.d,
            BLOCK_M=size.rows, BLOCK_N=size.columns, BLOCK_D=READ_FEATURES,
            **self.documents.arguments("begins", "lengths"),
        )  # fmt: skip
        return out, log_sum

    def backward(
        self, states: _States, out: Tensor, log_sum: Tensor, d_out: Tensor, d_final: MemoryState
    ) -> tuple[Tensor, ...]:
        """Returns the gradients of q, k, v, weight, the incoming kv and norm, and beta."""
        rotated_q = self.q.new_empty(self.rows, self.heads, self.n, self.d)
        along = torch.zeros_like(log_sum)
        share, d_denominator, d_beta = (
            log_sum.new_empty(self.rows, self.heads, self.n) for _ in range(3)
        )
        size = self._tiles("read_gradient")
        dq = torch.empty_like(out)
        launch(
            read_gradient_kernel, self._grid(size.rows, self.heads), size.options,
            q=self.q, kv=states.kv, norm=states.norm, beta=self.beta, cos=self.cos, sin=self.sin,
            out=out, d_out=d_out, rotated_q=rotated_q, dq=dq, along=along, share=share,
            d_denominator=d_denominator, d_beta=d_beta, **_strides("q", self.q), n=self.n,
            padded_n=self.padded_n, heads=self.heads, kv_heads=self.kv_heads, EPSILON=EPSILON,
            D=self.d, BLOCK_ROWS=size.rows, **self.documents.arguments("begins", "lengths"),
        )  # fmt: skip
        d_read = self._sums(self.q, d_out.flatten(0, 1), share, d_denominator)
        both = self.k.new_empty(states.kv.shape if self.rule == "delta" else 0)
        d_written, d_incoming = self._scan_back(states, *d_read, d_final, both)
        dk, dv = (
            torch.empty(
                self.batch, self.segments, self.n, self.kv_heads, self.d,
                dtype=x.dtype, device=x.device,
            )
            for x in (self.k, self.v)
        )  # fmt: skip
        d_weight = torch.empty_like(self.weight)
        rotated_k = self.k.new_empty(self.rows, self.kv_heads, self.n, self.d)
        size = self._tiles("write_gradient")
        launch(
            write_gradient_kernel, self._grid(size.rows, self.kv_heads), size.options,
            k=self.k, v=self.v, weight=self.weight, norm=states.norm, both=both,
            d_kv=d_written.kv, d_norm=d_written.norm, cos=self.cos, sin=self.sin,
            rotated_k=rotated_k, dk=dk, dv=dv, d_weight=d_weight,
            **_strides("k", self.k), **_strides("v", self.v), n=self.n, kv_heads=self.kv_heads,
            EPSILON=EPSILON, DELTA=self.rule == "delta", D=self.d, BLOCK_ROWS=size.rows,
            BLOCK_V=size.columns, **self.documents.arguments("begins"),
        )  # fmt: skip
        local: dict[str, Any] = {
            "rotated_q": rotated_q, "rotated_k": rotated_k, "v": self.v, "norm": states.norm,
            "beta": self.beta, "cos": self.cos, "sin": self.sin, "d_out": d_out,
            "log_sum": log_sum, "along": along, **_strides("v", self.v), "n": self.n,
            "padded_n": self.padded_n, "kv_heads": self.kv_heads, "scale": self.scale,
            "LN_2": math.log(2), "D": self.d,
        }  # fmt: skip
        size = self._tiles("query_gradient")
        launch(
            query_gradient_kernel, self._grid(size.rows, self.heads), size.options,
            dq=dq, heads=self.heads, BLOCK_M=size.rows, BLOCK_N=size.columns, **local,
            **self.documents.arguments("begins", "lengths"),
        )  # fmt: skip
        size = self._tiles("key_gradient")
        launch(
            key_gradient_kernel, self._grid(size.columns, self.kv_heads), size.options,
            dk=dk, dv=dv, GROUP=self.heads // self.kv_heads, BLOCK_M=size.rows,
            BLOCK_N=size.columns, **local,
            **self.documents.arguments("begins", "ends", "lengths"),
        )  # fmt: skip
        d_beta = d_beta.sum(dim=(0, 2)).to(self.beta.dtype)
        return dq, dk, dv, d_weight, *d_incoming, d_beta

    def _scan_back(
        self, states: _States, d_kv: Tensor, d_norm: Tensor, d_final: MemoryState, both: Tensor
    ) -> tuple[MemoryState, MemoryState]:
        """Computes gradients of the memory after each segment and of the incoming memory, from
        those of the memory before each segment and after the last. The delta rule fills `both`."""
        if self.rule == "linear":
            d_incoming_kv = self._scan(d_kv, d_final.kv, reverse=True)
        else:
            d_incoming_kv = torch.empty_like(d_final.kv)
            self._walk(
                "delta_gradient", delta_gradient_kernel, overlaps=self._overlaps(states.norm),
                damping=states.damping, d_kv=d_kv, d_final=d_final.kv, d_incoming=d_incoming_kv,
            )  # fmt: skip
            size = self._tiles("overlap_gradient")
            launch(
                overlap_gradient_kernel, (self.kv_heads, self.rows), size.options,
                k=self.k, weight=self.weight, kv=states.kv, norm=states.norm,
                damping=states.damping, d_kv=d_kv, both=both, d_norm=d_norm,
                **_strides("k", self.k), n=self.n, kv_heads=self.kv_heads, EPSILON=EPSILON,
                D=self.d, BLOCK_ROWS=size.rows, BLOCK_V=size.columns,
            )  # fmt: skip
        d_incoming_norm = self._scan(d_norm, d_final.norm, reverse=True)
        return MemoryState(d_kv, d_norm), MemoryState(d_incoming_kv, d_incoming_norm)

    def _overlaps(self, norm: Tensor) -> Tensor:
        """Launches `overlap_kernel`."""
        overlaps = torch.empty(self.rows, self.kv_heads, self.d, self.d, device=norm.device)
        size = self._tiles("overlap")
        launch(
            overlap_kernel, (self.kv_heads, self.rows), size.options,
            k=self.k, weight=self.weight, norm=norm, overlaps=overlaps, **_strides("k", self.k),
            n=self.n, kv_heads=self.kv_heads, EPSILON=EPSILON, D=self.d, BLOCK_ROWS=size.rows,
        )  # fmt: skip
        return overlaps

    def _walk(self, name: str, kernel: Any, **tensors: Tensor) -> None:
        """Launches `delta_kernel` or `delta_gradient_kernel`."""
        size = self._tiles(name)
        launch(
            kernel, (self.d // size.columns, self.batch * self.kv_heads), size.options,
            **tensors, starts=self.starts, segments=self.segments, kv_heads=self.kv_heads,
            PRECISION="ieee" if self.q.dtype == torch.float32 else "tf32", D=self.d,
            BLOCK_V=size.columns,
        )  # fmt: skip

    def _sums(
        self,
        x: Tensor,
        y: Tensor,
        weight: Tensor,
        norm_weight: Tensor,
        rotated: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns (weight sigma(x))^T y and the sum of norm_weight sigma(x), by key-value head.

        If `rotated` is given, it receives x with rotary positions.
        """
        kv = torch.empty(self.rows, self.kv_heads, self.d, self.d, device=x.device)
        norm = torch.empty(self.rows, self.kv_heads, self.d, device=x.device)
        size = self._tiles("sums")
        documents = _NOT_PACKED if rotated is None else self.documents
        launch(
            sums_kernel, (self.d // size.columns, self.kv_heads, self.rows), size.options,
            x=x, y=y, weight=weight, norm_weight=norm_weight, kv=kv, norm=norm,
            rotated=x if rotated is None else rotated, cos=self.cos, sin=self.sin,
            **_strides("x", x), **_strides("y", y), n=self.n, kv_heads=self.kv_heads,
            GROUP=x.shape[2] // self.kv_heads, ROTATES=rotated is not None, D=self.d,
            BLOCK_ROWS=size.rows, BLOCK_V=size.columns, **documents.arguments("begins"),
        )  # fmt: skip
        return kv, norm

    def _scan(self, x: Tensor, incoming: Tensor, reverse: bool = False) -> Tensor:
        """Launches `scan_kernel`, which changes x in place, and returns the final state."""
        final = torch.empty_like(incoming)
        size = x[0, 0].numel()
        launch(
            scan_kernel, (triton.cdiv(size, SCAN_BLOCK), self.batch * self.kv_heads), {},
            x=x, incoming=incoming, final=final, starts=self.starts, segments=self.segments,
            kv_heads=self.kv_heads, SIZE=size, BLOCK=SCAN_BLOCK, REVERSE=reverse,
        )  # fmt: skip
        return final

    def _grid(self, size: int, heads: int) -> tuple[int, int, int]:
        return triton.cdiv(self.n, size), heads, self.rows

    def _tiles(self, kernel: str) -> Tiles:
        packed = self.documents is not _NOT_PACKED
        return tiles(kernel, self.d, self.q.itemsize, generation(self.q.device), packed)


def _rows_in_place(x: Tensor) -> Tensor:
    """Flattens batch and segments of [batch, segments, n, heads, d], without a copy if possible."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, segments = x.shape[:2]
    in_place = batch == 1 or x.stride(0) == segments * x.stride(1)
    return (x if in_place else x.contiguous()).flatten(0, 1)


def _strides(name: str, x: Tensor) -> dict[str, int]:
    """Returns the strides of x [segments, n, heads, d] under the kernels' names for them."""
    return dict(zip((f"{name}_segment", f"{name}_row", f"{name}_head"), x.stride(), strict=False))
