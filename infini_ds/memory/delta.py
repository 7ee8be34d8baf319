"""The paper's second rule, which first removes what the memory already holds for a key."""

import torch
from torch import Tensor

from infini_ds.memory.linear import added
from infini_ds.memory.rule import DividingRule
from infini_ds.memory.state import EPSILON, MemoryState


class Delta(DividingRule):
    """eq. (5): M' = M + (w sigma(k))^T (v - c sigma(k) M / (sigma(k) z)); see `delta_damping`."""

    name = "delta"

    def write(
        self, memory: MemoryState, features: Tensor, weight: Tensor, values: Tensor
    ) -> MemoryState:
        weighted_k = features * weight[..., None]
        reads = torch.einsum("b n h k, b h k -> b n h", features, memory.norm).clamp(min=EPSILON)
        overlap = torch.einsum(
            "b n h i, b n h j -> b h i j", weighted_k / reads[..., None], features
        )
        damping = delta_damping(overlap, memory.norm, weighted_k.sum(dim=1))[:, None, :, None]
        return added(memory, weighted_k, values - damping * self.read(features, memory))

    def write_flops(self, head_dim: int, n: int) -> int:
        """The product of a key and a value, and as much again for what the key reads."""
        return 2 * 2 * head_dim**2

    def handed_on(self, kv_heads: int, head_dim: int) -> int:
        """A of z is one number for all heads, A of M a matrix for each; B as M and z."""
        return 1 + kv_heads * head_dim * (2 * head_dim + 1)


@torch.no_grad()
def delta_damping(overlap: Tensor, norm: Tensor, added_norm: Tensor) -> Tensor:
    """Computes c, the factor on what eq. (5) subtracts that keeps the delta rule stable.

    c is 1 wherever eq. (5) is stable by itself. A segment multiplies the stored M by I - c G, where
    G, the sum of w sigma(k)^T sigma(k) / (sigma(k) z), is symmetric and positive semi-definite.
    This cannot make M grow while the largest eigenvalue of c G is at most 2. G has no negative
    entry, so by Collatz and Wielandt that eigenvalue is at most max(G x / x) for any positive x. We
    start from x = z, for which G z is the norm that the segment adds, and tighten the bound by two
    power steps. Where the bound exceeds 2 (a segment that writes more than about twice what is
    stored, as after a short first segment), c brings it down to 2. Gradients treat c as a constant.

    Args:
        overlap: [..., d, d], G.
        norm, added_norm: [..., d].

    Returns:
        [...], in [0, 1]; 0 where nothing is stored.
    """
    previous = (overlap @ added_norm[..., None])[..., 0]
    x = (overlap @ previous[..., None])[..., 0]
    bound = (x / previous.clamp(min=EPSILON)).amax(dim=-1)
    damping = (2 / bound.clamp(min=EPSILON)).clamp(max=1)
    return torch.where(norm.sum(-1) > 0, damping, torch.zeros_like(damping))
