"""A causal convolution over the tokens just before, one filter a channel."""

import torch
from torch import Tensor, nn

TAPS = 4
"""Earlier tokens that each token sees.

With 3, the usual number, the last two of a pass key's five digits see nothing but digits: keys with
a digit twice were now and then answered with these two wrong."""


class ShortConv(nn.Module):
    """x_t + sum over i of c_i x_(t - i), c_i of each channel; the identity at the start."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, TAPS))

    def forward(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """Consecutive tokens of one segment.

        Args:
            x: [..., t, heads, d], heads x d channels.
            before: [..., TAPS, heads, d], the tokens just before, zeros where there are none.

        Returns:
            The same shape as x, and the last TAPS tokens as they were, for those that follow.
        """
        seen = torch.cat((before, x), dim=-3)
        taps = self.weight.mT.unflatten(1, x.shape[-2:])  # [TAPS, heads, d]
        out = x
        for back, tap in enumerate(taps, start=1):
            out = torch.addcmul(out, tap, seen.narrow(-3, TAPS - back, x.shape[-3]))
        return out, seen.narrow(-3, x.shape[-3], TAPS)
