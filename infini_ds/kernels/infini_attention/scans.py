"""Scans and walks over the segments of a window, which restart where a document begins."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def scan(added: Tensor, incoming: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Scans over segments exclusively, eq. (4), and restarts where a document starts.

    The scan is a product with a matrix of zeros and ones. Differences of cumulative sums would
    leave rounding errors of one document in the memory of the next.

    Args:
        added: [batch, segments, ...], what each segment adds.
        incoming: [batch, ...], the state before the window.

    Returns:
        The state that each segment reads, and the state after the last segment.
    """
    segments = starts.shape[1]
    document = F.pad(starts, (1, 1)).cumsum(1)  # [batch, segments + 2]
    document[:, -1] = document[:, -2]  # the final memory is the last document's
    # Sources are the incoming state and the segments; readers are the segments and the final state.
    source, reader = document[:, :-1], document[:, 1:]
    before = torch.ones(segments + 1, segments + 1, dtype=torch.bool, device=starts.device).tril()
    same = (reader[:, :, None] == source[:, None, :]) & before
    terms = torch.cat((incoming[:, None], added), dim=1)  # [batch, segments + 1, ...]
    sums = (same.float() @ terms.flatten(2)).view_as(terms)
    return sums[:, :-1], sums[:, -1]


def walk(
    added: Tensor, overlaps: Tensor, incoming: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor]:
    """Works like `scan` for eq. (5), where each segment also subtracts `overlaps` @ the state."""
    kv = incoming
    before = []
    begins = starts[..., None, None, None]
    # Views that are taken one by one would each have a gradient as large as all of them.
    for begin, own, overlap in zip(*(x.unbind(1) for x in (begins, added, overlaps)), strict=True):
        kv = kv.masked_fill(begin, 0)
        before.append(kv)
        kv = kv + own - overlap @ kv
    return torch.stack(before, dim=1), kv


def map_walk(added: Tensor, overlaps: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Works like `walk` over maps of the state before a part, A S + B.

    Returns:
        The map to the state that each segment finds, [batch, segments, kv_heads, d, 2 d], with B in
        the left half and A in the right one, and the map to the state after the last segment.
    """
    return _MapWalk.apply(added, overlaps, starts)  # type: ignore[return-value]


def unchanged(batch: int, kv_heads: int, f: int, d: int, device: torch.device) -> Tensor:
    """Returns the map of no segments, [batch, kv_heads, f, d + f] with B = 0 and A = 1, in fp32."""
    return torch.eye(f, d + f, device=device).roll(d, dims=1).expand(batch, kv_heads, f, d + f)


class _MapWalk(torch.autograd.Function):
    """Keeps nothing but the overlaps and the maps before each segment for the backward pass."""

    @staticmethod
    def forward(ctx, added, overlaps, starts):
        batch, segments, kv_heads, d, _ = added.shape
        maps = added.new_empty(batch, segments, kv_heads, d, 2 * d)
        state = unchanged(batch, kv_heads, d, d, added.device)
        for s in range(segments):
            found = state.masked_fill(starts[:, s, None, None, None], 0)
            maps[:, s] = found
            state = found - overlaps[:, s] @ found
            state[..., :d] += added[:, s]
        ctx.save_for_backward(maps, overlaps, starts)
        return maps, state

    @staticmethod
    @once_differentiable
    def backward(ctx, d_maps, d_end):
        maps, overlaps, starts = ctx.saved_tensors
        d_added, d_overlaps = torch.empty_like(overlaps), torch.empty_like(overlaps)
        d_state, d = d_end, overlaps.shape[-1]
        for s in reversed(range(maps.shape[1])):
            d_added[:, s] = d_state[..., :d]
            d_overlaps[:, s] = -d_state @ maps[:, s].mT
            d_state = d_state - overlaps[:, s].mT @ d_state + d_maps[:, s]
            d_state = d_state.masked_fill(starts[:, s, None, None, None], 0)
        return d_added, d_overlaps, None
