"""The paper's rules, linear and delta, by Triton kernels."""

import torch
import triton
from torch import Tensor

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
from infini_ds.kernels.infini_attention.triton.window import (
    NOT_PACKED,
    ReadGradients,
    States,
    Window,
    WriteGradients,
    strides,
)
from infini_ds.memory.state import EPSILON, MemoryState

SCAN_BLOCK = 1024
"""How many numbers of a state one program carries from segment to segment."""


class PaperWindow(Window):
    """Launches the kernels of eq. (3), (4) and (5)."""

    normalized = False

    def write(self, incoming: MemoryState) -> tuple[States, MemoryState, Tensor]:
        rotated_k = self.k.new_empty(self.rows, self.kv_heads, self.n, self.d)
        kv, norm = self._sums(self.k, self.v, self.weight, self.weight, rotated_k)
        incoming = MemoryState(*(x.contiguous() for x in incoming))
        if self.rule == "linear":
            nothing = norm.new_empty(0)
            final = MemoryState(self._scan(kv, incoming.kv), self._scan(norm, incoming.norm))
            return States(kv, norm, nothing), final, rotated_k
        added_norm = norm.clone()
        final_norm = self._scan(norm, incoming.norm)
        overlaps = self._overlaps(norm)
        damping = norm.new_empty(self.rows, self.kv_heads)
        self.launch(
            damping_kernel, (self.kv_heads, self.rows), {"num_warps": 8, "num_stages": 1},
            overlaps=overlaps, added_norm=added_norm, damping=damping, kv_heads=self.kv_heads,
            EPSILON=EPSILON, D=self.d,
        )  # fmt: skip
        final_kv = torch.empty_like(incoming.kv)
        self.walk(
            "delta", delta_kernel, overlaps=overlaps, damping=damping, kv=kv,
            incoming=incoming.kv, final=final_kv,
        )  # fmt: skip
        return States(kv, norm, damping), MemoryState(final_kv, final_norm), rotated_k

    def read_gradients(
        self, states: States, out: Tensor, log_sum: Tensor, d_out: Tensor
    ) -> ReadGradients:
        rotated_q = self.q.new_empty(self.rows, self.heads, self.n, self.d)
        along = torch.zeros_like(log_sum)
        share, d_denominator, d_beta = (
            log_sum.new_empty(self.rows, self.heads, self.n) for _ in range(3)
        )
        size = self.tiles("read_gradient")
        dq = torch.empty_like(out)
        self.launch(
            read_gradient_kernel, self.grid(size.rows, self.heads), size.options,
            q=self.q, kv=states.kv, norm=states.norm, beta=self.beta, cos=self.cos, sin=self.sin,
            out=out, d_out=d_out, rotated_q=rotated_q, dq=dq, along=along, share=share,
            d_denominator=d_denominator, d_beta=d_beta, **strides("q", self.q), n=self.n,
            padded_n=self.padded_n, heads=self.heads, kv_heads=self.kv_heads, EPSILON=EPSILON,
            D=self.d, BLOCK_ROWS=size.rows, **self.documents.arguments("begins", "lengths"),
        )  # fmt: skip
        d_found = self._sums(self.q, d_out.flatten(0, 1), share, d_denominator)
        return ReadGradients(dq, rotated_q, along, d_beta, d_found)

    def write_gradients(
        self, states: States, d_found: tuple[Tensor, ...], d_final: MemoryState
    ) -> WriteGradients:
        both = self.k.new_empty(states.kv.shape if self.rule == "delta" else 0)
        d_found_kv, d_found_norm = d_found
        d_written, d_incoming = self._scan_back(states, d_found_kv, d_found_norm, d_final, both)
        dk, dv = (
            torch.empty(
                self.batch, self.segments, self.n, self.kv_heads, self.d,
                dtype=x.dtype, device=x.device,
            )
            for x in (self.k, self.v)
        )  # fmt: skip
        d_weight = torch.empty_like(self.weight)
        rotated_k = self.k.new_empty(self.rows, self.kv_heads, self.n, self.d)
        size = self.tiles("write_gradient")
        self.launch(
            write_gradient_kernel, self.grid(size.rows, self.kv_heads), size.options,
            k=self.k, v=self.v, weight=self.weight, norm=states.norm, both=both,
            d_kv=d_written.kv, d_norm=d_written.norm, cos=self.cos, sin=self.sin,
            rotated_k=rotated_k, dk=dk, dv=dv, d_weight=d_weight,
            **strides("k", self.k), **strides("v", self.v), n=self.n, kv_heads=self.kv_heads,
            EPSILON=EPSILON, DELTA=self.rule == "delta", D=self.d, BLOCK_ROWS=size.rows,
            BLOCK_V=size.columns, **self.documents.arguments("begins"),
        )  # fmt: skip
        return WriteGradients(dk, dv, d_weight, rotated_k, d_incoming)

    def _scan_back(
        self, states: States, d_kv: Tensor, d_norm: Tensor, d_final: MemoryState, both: Tensor
    ) -> tuple[MemoryState, MemoryState]:
        """Computes gradients of the memory after each segment and of the incoming memory, from
        those of the memory before each segment and after the last. The delta rule fills `both`."""
        if self.rule == "linear":
            d_incoming_kv = self._scan(d_kv, d_final.kv, reverse=True)
        else:
            d_incoming_kv = torch.empty_like(d_final.kv)
            self.walk(
                "delta_gradient", delta_gradient_kernel, overlaps=self._overlaps(states.norm),
                damping=states.damping, d_kv=d_kv, d_final=d_final.kv, d_incoming=d_incoming_kv,
                TRANSPOSED=False,
            )  # fmt: skip
            size = self.tiles("overlap_gradient")
            self.launch(
                overlap_gradient_kernel, (self.kv_heads, self.rows), size.options,
                k=self.k, weight=self.weight, kv=states.kv, norm=states.norm,
                damping=states.damping, d_kv=d_kv, both=both, d_norm=d_norm,
                **strides("k", self.k), n=self.n, kv_heads=self.kv_heads, EPSILON=EPSILON,
                D=self.d, BLOCK_ROWS=size.rows, BLOCK_V=size.columns,
            )  # fmt: skip
        d_incoming_norm = self._scan(d_norm, d_final.norm, reverse=True)
        return MemoryState(d_kv, d_norm), MemoryState(d_incoming_kv, d_incoming_norm)

    def _overlaps(self, norm: Tensor) -> Tensor:
        """Launches `overlap_kernel`."""
        overlaps = torch.empty(self.rows, self.kv_heads, self.d, self.d, device=norm.device)
        size = self.tiles("overlap")
        self.launch(
            overlap_kernel, (self.kv_heads, self.rows), size.options,
            k=self.k, weight=self.weight, norm=norm, overlaps=overlaps, **strides("k", self.k),
            n=self.n, kv_heads=self.kv_heads, EPSILON=EPSILON, D=self.d, BLOCK_ROWS=size.rows,
        )  # fmt: skip
        return overlaps

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
        size = self.tiles("sums")
        documents = NOT_PACKED if rotated is None else self.documents
        self.launch(
            sums_kernel, (self.d // size.columns, self.kv_heads, self.rows), size.options,
            x=x, y=y, weight=weight, norm_weight=norm_weight, kv=kv, norm=norm,
            rotated=x if rotated is None else rotated, cos=self.cos, sin=self.sin,
            **strides("x", x), **strides("y", y), n=self.n, kv_heads=self.kv_heads,
            GROUP=x.shape[2] // self.kv_heads, ROTATES=rotated is not None, D=self.d,
            BLOCK_ROWS=size.rows, BLOCK_V=size.columns, **documents.arguments("begins"),
        )  # fmt: skip
        return kv, norm

    def _scan(self, x: Tensor, incoming: Tensor, reverse: bool = False) -> Tensor:
        """Launches `scan_kernel`, which changes x in place, and returns the final state."""
        final = torch.empty_like(incoming)
        size = x[0, 0].numel()
        self.launch(
            scan_kernel, (triton.cdiv(size, SCAN_BLOCK), self.batch * self.kv_heads), {},
            x=x, incoming=incoming, final=final, starts=self.starts, segments=self.segments,
            kv_heads=self.kv_heads, SIZE=size, BLOCK=SCAN_BLOCK, REVERSE=reverse,
        )  # fmt: skip
        return final
