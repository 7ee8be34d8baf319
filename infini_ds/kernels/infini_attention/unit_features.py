"""Features of the gated delta rules, with a gradient for which nothing but the input is needed."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from infini_ds.memory.gated_delta import KEY_EPSILON


class UnitFeatures(ABC):
    """What queries and keys are mapped to, with length 1, in fp32."""

    features: Tensor
    """[..., f]."""

    @abstractmethod
    def gradient(self, d_features: Tensor) -> Tensor:
        """Returns the gradient of x from that of the features."""


def unit_features(x: Tensor, shifts: int) -> UnitFeatures:
    """Computes the features of queries or keys [..., d].

    Args:
        shifts: those of DPFP; 0: features are the direction of x.
    """
    return _Products(x.float(), shifts) if shifts else _Direction(x.float())


class _Direction(UnitFeatures):
    """x over its length."""

    def __init__(self, x: Tensor):
        self._scale = torch.linalg.vecdot(x, x)[..., None].add_(KEY_EPSILON).rsqrt_()
        self.features = x * self._scale

    def gradient(self, d_features: Tensor) -> Tensor:
        along = torch.linalg.vecdot(self.features, d_features)[..., None]
        return torch.addcmul(d_features, self.features, along, value=-1).mul_(self._scale)


class _Products(UnitFeatures):
    """The products of DPFP over their length.

    Let u be the positive parts of x and -x, and s the squares of u. The products' sum of squares is
    that of s_i s_(i-j) over elements i and shifts j, so 2 d numbers are enough for it.
    """

    def __init__(self, x: Tensor, shifts: int):
        d = x.shape[-1]
        self._size, self._shifts = 2 * d, range(1, shifts + 1)
        # u, continued in front by its end and behind by its beginning.
        self._ring = x.new_empty(*x.shape[:-1], 2 * d + 2 * shifts)
        u = self._at(self._ring, 0)
        torch.clamp(x, min=0, out=u[..., :d])
        torch.clamp(x, max=0, out=u[..., d:]).neg_()
        self._ring[..., :shifts] = u[..., -shifts:]
        self._ring[..., -shifts:] = u[..., :shifts]
        square = self._ring.square()
        length = torch.linalg.vecdot(self._at(square, 0), self._sum(square, -1))[..., None]
        # Products are quadratic: if u is multiplied by the root of a number, they are by it.
        self._root = length.add_(KEY_EPSILON).rsqrt_().sqrt_()
        self._ring.mul_(self._root)
        self.features = x.new_empty(*x.shape[:-1], shifts * 2 * d)
        for shift, part in zip(self._shifts, self._parts(self.features), strict=True):
            torch.mul(u, self._at(self._ring, -shift), out=part)

    def gradient(self, d_features: Tensor) -> Tensor:
        u, d_ring = self._at(self._ring, 0), torch.zeros_like(self._ring)
        d_u = self._at(d_ring, 0)
        for shift, part in zip(self._shifts, self._parts(d_features), strict=True):
            d_u.addcmul_(part, self._at(self._ring, -shift))
            self._at(d_ring, -shift).addcmul_(part, u)
        last = len(self._shifts)
        d_u[..., -last:] += d_ring[..., :last]
        along = torch.linalg.vecdot(d_u, u)[..., None].div_(2)
        square = self._ring.square()
        longer = self._sum(square, -1).add_(self._sum(square, 1)).mul_(u)
        d_u.addcmul_(longer, along, value=-1).mul_(self._root)
        above, below = d_u.mul_(u.sign()).chunk(2, dim=-1)  # faster than filling by a mask
        return above - below

    def _at(self, ring: Tensor, places: int) -> Tensor:
        """Views what is so many places behind each element of u, [..., 2 d]."""
        first = len(self._shifts) + places
        return ring[..., first : first + self._size]

    def _sum(self, ring: Tensor, sign: int) -> Tensor:
        """Sums what is as many places behind each element as shifts say, or before it."""
        total = self._at(ring, sign).clone()
        for shift in self._shifts[1:]:
            total += self._at(ring, sign * shift)
        return total

    def _parts(self, features: Tensor) -> tuple[Tensor, ...]:
        """Views the features of each shift."""
        return features.split(self._size, dim=-1)
