"""A causal convolution over the preceding tokens, with one filter for each channel."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infini_ds.layout import made_once


class ShortConv(nn.Module):
    """Computes the sum over i from 0 to taps of c_i x_(t - i), with filters c_i for each channel.

    c_0 is 1 and all others are 0 initially, so that the layer starts as the identity; models in
    training begin with other filters for keys (`InfiniAttention.begin_with_induction`).

    Args:
        channels: number of channels.
        taps: number of earlier tokens that each token sees.
    """

    def __init__(self, channels: int, taps: int):
        super().__init__()
        self.weight = nn.Parameter(identity(channels, taps))
        """[channels, taps + 1]: c_taps first, c_0 last."""

    @property
    def taps(self) -> int:
        """Number of earlier tokens that each token sees."""
        return self.weight.shape[1] - 1

    def forward(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """Convolves consecutive tokens.

        Args:
            x: [..., t, heads, d], heads x d channels.
            before: [..., taps, heads, d], the preceding tokens, zeros where there are none.

        Returns:
            The output in the shape of x, and the last `taps` input tokens, which are `before` for
            the tokens that follow.
        """
        seen = torch.cat((before, x), dim=-3)
        # As images of one row, [..., channels, 1, tokens], whose channels are last in memory.
        images = seen.flatten(-2).flatten(end_dim=-3).mT.unsqueeze(2)
        out = F.conv2d(images, self.weight[:, None, None], groups=len(self.weight))
        return out.squeeze(2).mT.reshape(x.shape), seen.narrow(-3, x.shape[-3], self.taps)

    def packed(self, x: Tensor, begins: Tensor, before: Tensor) -> Tensor:
        """Whole segments of several documents, none of which sees tokens of another.

        Args:
            x: [batch, segments, n, heads, d].
            begins: as in Layout, [batch, segments, n].
            before: [batch, segments, taps, heads, d], the tokens before the first document's.

        Returns:
            The same shape as x.
        """
        out, _ = self(x, before)
        rows, sources, inside = _first_rows(begins, self.taps)
        filters = self.weight.mT.unflatten(1, x.shape[-2:])  # [taps + 1, heads, d]
        # A product with 0 would keep numbers of another document that are not finite.
        seen = x.flatten(0, 2)[sources].masked_fill(~inside[..., None, None], 0)
        own = (seen * filters).sum(dim=1)
        return out.flatten(0, 2).index_copy(0, rows, own.to(out.dtype)).view_as(out)


def identity(channels: int, taps: int) -> Tensor:
    """Returns the filters that leave every token as it is, [channels, taps + 1]."""
    return F.pad(torch.ones(channels, 1), (taps, 0))


def of_earlier_tokens(channels: int, taps: int) -> Tensor:
    """Returns filters each of which picks one earlier token, [channels, taps + 1].

    Every other channel picks the token before; the channels between them pick the tokens 2 to
    `taps` before in turn. Channels of the first half and of the second are alike, because rotary
    positions rotate them as pairs.
    """
    channel = torch.arange(channels) % max(1, channels // 2)
    farther = 2 + (channel // 2) % max(1, taps - 1)
    back = torch.where(channel % 2 == 0, 1, farther.clamp(max=taps))
    return F.one_hot(taps - back, taps + 1).float()


def _first_rows(begins: Tensor, taps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Finds the rows, of lanes and segments flattened, that begin documents behind a segment's
    first and would see tokens of the document before.

    Returns:
        The rows, [rows]; the rows that they see with themselves last, [rows, taps + 1]; and which
        of these are of their own document, bool [rows, taps + 1].
    """

    def make() -> tuple[Tensor, Tensor, Tensor]:
        n = begins.shape[-1]
        place = torch.arange(n, device=begins.device) - begins
        behind = (begins > 0) & (begins < n) & (place < taps)
        (rows,) = behind.flatten().nonzero(as_tuple=True)
        back = torch.arange(taps, -1, -1, device=begins.device)
        inside = back <= place.flatten()[rows][:, None]
        return rows, (rows[:, None] - back).clamp(min=0), inside

    return made_once(begins, ("first rows", taps), make)
