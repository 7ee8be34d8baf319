"""The segment before each one, which the tokens of a sliding window attend to."""

from typing import Any

import torch
from torch import Tensor

from infini_ds.kernels.local_attention.rotary import rotated


class Earlier:
    """Keys and values of the segment before each one, with batch and segments flattened.

    Row i of a segment's first document attends to token j of the segment before if j > i and if the
    document has a token there.

    Args:
        previous: as in `Inputs`.
        dtype: the kernels' type.
        cos, sin: rotary tables of its tokens, [width, d / 2].
        n: rows of a segment.
        lengths: [batch, segments], rows of each segment's first document; None: all rows.
    """

    def __init__(
        self,
        previous: Tensor,
        dtype: torch.dtype,
        cos: Tensor,
        sin: Tensor,
        n: int,
        lengths: Tensor | None,
    ):
        self._shape, self._dtype = previous.shape, previous.dtype
        self._cos, self._sin = (table.unsqueeze(-2) for table in (cos, sin))
        self.width = previous.shape[2]
        k, v = previous.to(dtype).flatten(0, 1).chunk(2, dim=2)  # [segments, width, kv_heads, d]
        there = (k != 0).flatten(2).any(dim=-1)
        place = torch.arange(self.width, dtype=torch.int32, device=k.device)
        self.ends = place.clamp(max=n).mul(there)
        """[segments, width] int32: each token is seen by the rows before this one, 0 if by none."""
        if lengths is not None:
            self.ends = torch.minimum(self.ends, lengths.flatten()[:, None])
        self.rows = self.ends.amax(dim=-1)
        """[segments] int32, the largest of them."""
        self.k = self._turned(k, self._sin).transpose(1, 2).contiguous()
        """[segments, kv_heads, width, d], with rotary positions."""
        self.v = v.transpose(1, 2).contiguous()
        """Of the same shape."""

    def arguments(self) -> dict[str, Any]:
        """Those of a kernel that attends to them."""
        return {
            "earlier_k": self.k, "earlier_v": self.v, "earlier_ends": self.ends,
            "earlier_rows": self.rows, "width": self.width, "SLIDING": True,
        }  # fmt: skip

    def gradient(self, dk: Tensor, dv: Tensor) -> Tensor:
        """Returns the gradient of `previous` from those of k and v."""
        dk, dv = (x.transpose(1, 2) for x in (dk, dv))
        both = torch.cat((self._turned(dk, -self._sin), dv), dim=2)
        return both.view(self._shape).to(self._dtype)

    def _turned(self, x: Tensor, sin: Tensor) -> Tensor:
        return rotated(x.float(), self._cos, sin).to(x.dtype)


NOT_SLIDING: dict[str, Any] = dict.fromkeys(
    ("earlier_k", "earlier_v", "earlier_ends", "earlier_rows")
) | {"width": 0, "SLIDING": False}
"""Arguments of a kernel where no window slides."""
