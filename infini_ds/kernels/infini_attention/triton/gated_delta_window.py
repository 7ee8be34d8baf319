"""The gated delta rule by Triton kernels."""

import torch
import triton
from torch import Tensor

from infini_ds.kernels.infini_attention.triton.delta import delta_gradient_kernel, delta_kernel
from infini_ds.kernels.infini_attention.triton.gated_delta import (
    chunks_gradient_kernel,
    chunks_kernel,
    keys_kernel,
    tokens_gradient_kernel,
)
from infini_ds.kernels.infini_attention.triton.normalized_read import (
    normalized_read_gradient_kernel,
    read_sums_kernel,
)
from infini_ds.kernels.infini_attention.triton.window import (
    ReadGradients,
    States,
    Window,
    WriteGradients,
    strides,
)
from infini_ds.memory.state import MemoryState


class GatedDeltaWindow(Window):
    """Launches the kernels of the gated delta rule.

    Features of keys, inverses and the memories of chunks exist only while a pass runs.
    """

    normalized = True

    def write(self, incoming: MemoryState) -> tuple[States, MemoryState, Tensor]:
        keys, inverses, rotated_k = self._keys()
        overlaps = self._maps(keys, inverses, keys.transpose(1, 2))
        kv = self._maps(keys, inverses, self.v)
        final = incoming.map(torch.empty_like)
        self.walk(
            "delta", delta_kernel, overlaps=overlaps, damping=None, kv=kv,
            incoming=incoming.kv.contiguous(), final=final.kv,
        )  # fmt: skip
        largest = torch.linalg.vector_norm(kv, torch.inf, dim=-1)
        return States(kv, largest, largest.new_empty(0)), final, rotated_k

    def read_gradients(
        self, states: States, out: Tensor, log_sum: Tensor, d_out: Tensor
    ) -> ReadGradients:
        rotated_q, d_read = (
            self.q.new_empty(self.rows, self.heads, self.n, self.d) for _ in range(2)
        )
        along, dq = torch.zeros_like(log_sum), torch.empty_like(out)
        d_beta = log_sum.new_empty(self.rows, self.heads, self.n)
        size = self.tiles("normalized_read_gradient")
        self.launch(
            normalized_read_gradient_kernel, self.grid(size.rows, self.heads), size.options,
            q=self.q, kv=states.kv, norm=states.norm, beta=self.beta, cos=self.cos, sin=self.sin,
            out=out, d_out=d_out, rotated_q=rotated_q, dq=dq, d_read=d_read, along=along,
            d_beta=d_beta, **strides("q", self.q), n=self.n, padded_n=self.padded_n,
            heads=self.heads, kv_heads=self.kv_heads, D=self.d, BLOCK_ROWS=size.rows,
            **self.documents.arguments("begins", "lengths"),
        )  # fmt: skip
        d_found = torch.empty_like(states.kv)
        size = self.tiles("read_sums")
        self.launch(
            read_sums_kernel, (self.d // size.columns, self.kv_heads, self.rows), size.options,
            q=self.q, d_read=d_read, d_found=d_found, **strides("q", self.q), n=self.n,
            kv_heads=self.kv_heads, GROUP=self.heads // self.kv_heads, D=self.d,
            BLOCK_ROWS=size.rows, BLOCK_V=size.columns,
        )  # fmt: skip
        return ReadGradients(dq, rotated_q, along, d_beta, (d_found,))

    def write_gradients(
        self, states: States, d_found: tuple[Tensor, ...], d_final: MemoryState
    ) -> WriteGradients:
        (d_kv,) = d_found
        keys, inverses, rotated_k = self._keys()
        d_incoming = d_final.map(torch.empty_like)
        self.walk(
            "delta_gradient", delta_gradient_kernel,
            overlaps=self._maps(keys, inverses, keys.transpose(1, 2)), damping=None,
            d_kv=d_kv, d_final=d_final.kv, d_incoming=d_incoming.kv, TRANSPOSED=True,
        )  # fmt: skip
        by_chunk = self._by_chunk(keys, inverses, states.kv)
        d_by_chunk = torch.empty_like(by_chunk)
        size = self.tiles("chunks_gradient")
        self.launch(
            chunks_gradient_kernel, (self.d // size.columns, self.kv_heads, self.rows),
            size.options, keys=keys, inverses=inverses, weight=self.weight, d_after=d_kv,
            d_by_chunk=d_by_chunk, n=self.n, kv_heads=self.kv_heads, D=self.d, CHUNK=self.chunk,
            BLOCK_V=size.columns,
        )  # fmt: skip
        dk, dv = (
            torch.empty(
                self.batch, self.segments, self.n, self.kv_heads, self.d,
                dtype=x.dtype, device=x.device,
            )
            for x in (self.k, self.v)
        )  # fmt: skip
        d_weight = torch.empty_like(self.weight)
        size = self.tiles("tokens_gradient")
        self.launch(
            tokens_gradient_kernel, self.grid(self.chunk, self.kv_heads), size.options,
            k=self.k, v=self.v, keys=keys, inverses=inverses, weight=self.weight,
            by_chunk=by_chunk, d_by_chunk=d_by_chunk, dk=dk, dv=dv, d_weight=d_weight,
            **strides("k", self.k), **strides("v", self.v), n=self.n, kv_heads=self.kv_heads,
            D=self.d, CHUNK=self.chunk, BLOCK_V=size.columns,
        )  # fmt: skip
        return WriteGradients(dk, dv, d_weight, rotated_k, d_incoming)

    @property
    def chunk(self) -> int:
        """Number of tokens whose triangular system is solved at once."""
        return self.tiles("keys").rows

    @property
    def _chunks(self) -> int:
        return triton.cdiv(self.n, self.chunk)

    def _keys(self) -> tuple[Tensor, Tensor, Tensor]:
        """Launches `keys_kernel`; returns features of the keys, the chunks' inverses, and keys with
        rotary positions."""
        keys, rotated_k = (
            self.k.new_empty(self.rows, self.kv_heads, self.n, self.d) for _ in range(2)
        )
        inverses = self.k.new_empty(self.rows, self.kv_heads, self._chunks, self.chunk, self.chunk)
        size = self.tiles("keys")
        self.launch(
            keys_kernel, self.grid(self.chunk, self.kv_heads), size.options,
            k=self.k, weight=self.weight, cos=self.cos, sin=self.sin, keys=keys,
            rotated=rotated_k, inverses=inverses, **strides("k", self.k), n=self.n,
            kv_heads=self.kv_heads, PRECISION=self.precision, D=self.d, CHUNK=self.chunk,
            **self.documents.arguments("begins"),
        )  # fmt: skip
        return keys, inverses, rotated_k

    def _maps(self, keys: Tensor, inverses: Tensor, values: Tensor) -> Tensor:
        """Returns B of each segment, or O with keys for values [segments, n, kv_heads, d]."""
        after = self.weight.new_empty(self.rows, self.kv_heads, self.d, self.d)
        self._go(keys, inverses, values, after=after)
        return after

    def _by_chunk(self, keys: Tensor, inverses: Tensor, kv: Tensor) -> Tensor:
        """Returns the memory before each chunk from that before each segment."""
        by_chunk = keys.new_empty(self.rows, self.kv_heads, self._chunks, self.d, self.d)
        self._go(keys, inverses, self.v, before=kv, by_chunk=by_chunk)
        return by_chunk

    def _go(
        self,
        keys: Tensor,
        inverses: Tensor,
        values: Tensor,
        before: Tensor | None = None,
        after: Tensor | None = None,
        by_chunk: Tensor | None = None,
    ) -> None:
        """Launches `chunks_kernel`."""
        size = self.tiles("chunks")
        self.launch(
            chunks_kernel, (self.d // size.columns, self.kv_heads, self.rows), size.options,
            keys=keys, inverses=inverses, weight=self.weight, values=values, before=before,
            after=after, by_chunk=by_chunk, **strides("values", values), n=self.n,
            kv_heads=self.kv_heads, KEEPS=by_chunk is not None, D=self.d, CHUNK=self.chunk,
            BLOCK_V=size.columns,
        )  # fmt: skip
