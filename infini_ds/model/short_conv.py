"""A causal convolution over the preceding tokens, with one filter for each channel."""

import torch
from torch import Tensor, nn

TAPS = 4
"""Number of earlier tokens that each token sees.

With 3, the usual number, the last two of a pass key's five digits see nothing but digits. Models
then sometimes got these two wrong in keys that repeat a digit."""


class ShortConv(nn.Module):
    """Computes x_t + sum over i of c_i x_(t - i), with filters c_i for each channel.

    All c_i are 0 initially, so that the layer starts as the identity.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, TAPS))

    def forward(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """Convolves consecutive tokens of one segment.

        Args:
            x: [..., t, heads, d], heads x d channels.
            before: [..., TAPS, heads, d], the preceding tokens, zeros where there are none.

        Returns:
            The output in the shape of x, and the last TAPS input tokens, which are `before` for the
            tokens that follow.
        """
        seen = torch.cat((before, x), dim=-3)
        taps = self.weight.mT.unflatten(1, x.shape[-2:])  # [TAPS, heads, d]
        out = x
        for back, tap in enumerate(taps, start=1):
            out = torch.addcmul(out, tap, seen.narrow(-3, TAPS - back, x.shape[-3]))
        return out, seen.narrow(-3, x.shape[-3], TAPS)
