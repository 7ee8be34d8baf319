"""The gated delta rule, which removes what the memory holds for a key token by token.

It is the delta rule of DeltaNet (Yang et al. 2024, arXiv 2406.06484) with a write gate, brought to
segments. Keys are signed and of length 1, so that a key may be orthogonal to all others, and a read
finds one value instead of a mean of all that was stored.
"""

import torch
from torch import Tensor

from infini_ds.memory.rule import MemoryRule, of_each_query
from infini_ds.memory.state import MemoryState

KEY_EPSILON = 1e-6
"""Added to the square of the length of a key's features, by which they are divided."""
READ_EPSILON = 1e-3
"""Added to the mean square of a read, by whose root it is divided. Values have mean squares of
about 0.1, so that a key for which nothing is stored reads little."""


class GatedDelta(MemoryRule):
    """M <- (I - w k^T k) M + w k^T v for each token in turn, where k and q are divided by their L2
    norms; what a segment reads, q M with M from before the segment, is RMS-normalised.

    A segment, or a chunk of it, is an affine map. With K its keys, V its values and w its write
    weights,

        T = (I + tril(diag(w) K K^T, -1))^-1 diag(w),   A = I - K^T T K,   B = K^T T V

    Each token's factor has a norm of at most 1, so that the memory cannot grow by itself.
    """

    name = "gated_delta"
    divides = False
    shifts = 0
    """Those of DPFP; 0: features are the direction of keys."""
    chunk = 32
    """Number of tokens whose triangular system is solved at once, the fastest of powers of two on a
    CPU with heads of 128."""

    def feature_size(self, head_dim: int) -> int:
        return 2 * head_dim * self.shifts or head_dim

    def features(self, x: Tensor) -> Tensor:
        if self.shifts:
            x = products(torch.cat((x, -x), dim=-1).relu(), self.shifts)
        return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + KEY_EPSILON)

    def read(self, features: Tensor, memory: MemoryState) -> Tensor:
        kv = of_each_query(memory.kv, features.shape[2])
        found = torch.einsum("b n h k, b h k v -> b n h v", features, kv)
        return found * torch.rsqrt(found.square().mean(dim=-1, keepdim=True) + READ_EPSILON)

    def written(self, memory: MemoryState) -> Tensor:
        return memory.kv.flatten(-2).any(dim=-1)

    def write(
        self, memory: MemoryState, features: Tensor, weight: Tensor, values: Tensor
    ) -> MemoryState:
        k, v = features.transpose(1, 2), values.transpose(1, 2)  # [batch, kv_heads, n, d]
        w = weight.transpose(1, 2)[..., None]
        system = torch.eye(k.shape[2]).to(k) + (w * k @ k.mT).tril(-1)
        new = w * (v - k @ memory.kv)
        kv = memory.kv + k.mT @ torch.linalg.solve_triangular(system, new, upper=False)
        return MemoryState(kv, memory.norm)

    def write_flops(self, head_dim: int, n: int) -> int:
        """Of a chunk, V - K M, K K^T, T (V - K M), and what K^T makes of that."""
        size = self.feature_size(head_dim)
        return 2 * (min(self.chunk, n) * (size + head_dim) + 2 * size * head_dim)

    def map_flops(self, head_dim: int, n: int, segments: int, ranks: int) -> int:
        """Chunks walk with a map that has as many more columns as there are features, and each
        part's A multiplies the memory once."""
        size = self.feature_size(head_dim)
        more = segments * n * 2 * size * (min(self.chunk, n) + 2 * size)
        return more + 2 * size**2 * head_dim * ranks

    def handed_on(self, kv_heads: int, head_dim: int) -> int:
        """A and B are a matrix each for each head."""
        size = self.feature_size(head_dim)
        return kv_heads * size * (size + head_dim)


class GatedDeltaDPFP(GatedDelta):
    """The same with more features than keys have channels, so that the memory tells more keys
    apart.

    With u the positive parts of a key and of its negative, [2 d], the features are the products of
    each element of u with those 1, 2 and 3 places before it: deterministic parameter-free
    projection (DPFP, Schlag et al. 2021, arXiv 2102.11174), again divided by their L2 norm.
    """

    name = "gated_delta_dpfp"
    shifts = 3
    chunk = 64


def products(positive: Tensor, shifts: int) -> Tensor:
    """Multiplies elements [..., f] by those 1 to `shifts` places before them, [..., shifts f]."""
    rolled = (positive.roll(shift, dims=-1) for shift in range(1, shifts + 1))
    return torch.cat([positive * other for other in rolled], dim=-1)
