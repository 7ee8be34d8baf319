"""Tokens that arrive in pieces, read into a memory in calls of bounded size."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from infini_ds.model.generation import WINDOW_SEGMENTS
from infini_ds.model.memory import Memory
from infini_ds.model.transformer import InfiniTransformer
from infini_ds.system.ranges import require_finite

_CALL_TOKENS = 16384


@torch.no_grad()
def absorb(
    model: InfiniTransformer,
    pieces: Iterable[np.ndarray],
    memory: Memory | None,
    on_read: Callable[[int], None],
) -> tuple[Memory | None, Tensor]:
    """Reads all but the end, which is never empty unless there are no tokens at all.

    Args:
        pieces: tokens [any length], uint32.
        memory: of a document that they go on with.
        on_read: called with the number of tokens just read.

    Raises:
        RunError: what the model makes of them is not finite.

    Returns:
        The memory, and the tokens still to be read, [1, up to 16 segments].
    """
    n = model.config.segment_length
    width = n * max(1, min(WINDOW_SEGMENTS, _CALL_TOKENS // n))
    device = next(model.parameters()).device
    rest = torch.empty(1, 0, dtype=torch.int64, device=device)
    for piece in pieces:
        new = torch.from_numpy(piece.astype(np.int64)).to(device)
        rest = torch.cat((rest, new[None]), dim=1)
        while rest.shape[1] > width:
            hidden, memory = model.read(rest[:, :width], memory)
            require_finite(hidden[:, -1], model, "what the model makes of the text is")
            rest = rest[:, width:]
            on_read(width)
    return memory, rest
