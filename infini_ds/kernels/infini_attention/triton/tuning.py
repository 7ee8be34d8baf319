"""Tile sizes, warps and pipeline stages of each kernel on each generation of GPUs.

All are chosen so that no registers spill, which `infini-ds bench kernels --compile-only` shows.
Finding the fastest of such choices requires a GPU.
"""

from typing import NamedTuple

from infini_ds.kernels.launch import AMPERE, BLACKWELL, HOPPER, RTX_BLACKWELL


class Tiles(NamedTuple):
    """The tile sizes and launch options of one kernel."""

    rows: int
    """Number of queries, or of tokens in a sum."""
    columns: int
    """Number of keys, or of columns of a memory."""
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """The options with which Triton launches the kernel."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def tiles(
    kernel: str,
    d: int,
    itemsize: int,
    generation: int,
    packed: bool = False,
    sliding: bool = False,
) -> Tiles:
    """Returns a kernel's tiles by its name, for head size d, operands of `itemsize` bytes, segments
    that are packed or not, and windows that slide or not.

    A generation that is not in the table takes the tiles of the nearest older one. RTX_BLACKWELL
    has AMPERE's matrix instructions and 99 KiB of shared memory, and takes AMPERE's tiles, with
    which some kernels may spill a few registers. Tiles for fp32 are small, because fp32 is meant to
    be exact rather than fast.
    """
    if itemsize == 4:
        return Tiles(32, 32, 4, 1)
    if generation >= RTX_BLACKWELL:
        generation = AMPERE
    tables = [*([_SLIDING_TILES] if sliding else []), *([_PACKED_TILES] if packed else []), _TILES]
    of_generation = next(table[kernel, d] for table in tables if (kernel, d) in table)
    known = [other for other in of_generation if other <= generation]
    return of_generation[max(known)]


_TILES = {
    ("attend", 64): {
        AMPERE: Tiles(128, 64, 8, 3),
    },
    ("attend", 128): {
        AMPERE: Tiles(64, 64, 4, 2),
        HOPPER: Tiles(128, 64, 8, 3),
        BLACKWELL: Tiles(128, 32, 8, 3),
    },
    # "attend" with NORMALIZED reads.
    ("normalized_attend", 64): {AMPERE: Tiles(128, 64, 8, 3)},
    ("normalized_attend", 128): {
        AMPERE: Tiles(64, 32, 4, 3),
        HOPPER: Tiles(128, 64, 8, 3),
        BLACKWELL: Tiles(128, 32, 8, 3),
    },
    ("read_gradient", 64): {AMPERE: Tiles(64, 64, 4, 1)},
    ("read_gradient", 128): {AMPERE: Tiles(64, 128, 8, 1)},
    ("write_gradient", 64): {AMPERE: Tiles(32, 32, 4, 1), HOPPER: Tiles(64, 64, 4, 1)},
    ("write_gradient", 128): {AMPERE: Tiles(32, 32, 8, 1), HOPPER: Tiles(64, 128, 8, 1)},
    ("query_gradient", 64): {AMPERE: Tiles(128, 64, 8, 2)},
    ("query_gradient", 128): {AMPERE: Tiles(64, 64, 8, 2), HOPPER: Tiles(128, 64, 8, 2)},
    ("key_gradient", 64): {
        AMPERE: Tiles(32, 64, 8, 2),
        HOPPER: Tiles(64, 128, 8, 2),
        BLACKWELL: Tiles(64, 64, 8, 2),
    },
    ("key_gradient", 128): {
        AMPERE: Tiles(32, 64, 8, 2),
        HOPPER: Tiles(32, 128, 8, 2),
        BLACKWELL: Tiles(128, 64, 8, 1),
    },
    # With more stages, where heads are grouped, Triton 3.6 and 3.7 generate code for Hopper that
    # writes the next weighted rows into registers that products still read.
    ("sums", 64): {
        AMPERE: Tiles(32, 64, 4, 3),
        HOPPER: Tiles(64, 64, 4, 1),
        BLACKWELL: Tiles(64, 64, 4, 2),
    },
    ("sums", 128): {AMPERE: Tiles(64, 128, 8, 2), HOPPER: Tiles(64, 128, 8, 1)},
    # With more stages, Triton 3.6's compiler crashes for Blackwell.
    ("overlap", 64): {AMPERE: Tiles(64, 64, 4, 2), BLACKWELL: Tiles(64, 64, 4, 1)},
    ("overlap", 128): {AMPERE: Tiles(64, 128, 8, 2), BLACKWELL: Tiles(64, 128, 8, 1)},
    ("delta", 64): {AMPERE: Tiles(64, 32, 4, 1)},
    ("delta", 128): {AMPERE: Tiles(128, 32, 8, 1)},
    ("delta_gradient", 64): {AMPERE: Tiles(64, 32, 4, 1)},
    ("delta_gradient", 128): {AMPERE: Tiles(128, 32, 8, 1)},
    ("overlap_gradient", 64): {AMPERE: Tiles(64, 32, 4, 1)},
    ("overlap_gradient", 128): {AMPERE: Tiles(32, 32, 8, 1), HOPPER: Tiles(64, 32, 8, 1)},
    # The rows of "keys" are the chunk of all kernels that have chunks.
    ("keys", 64): {AMPERE: Tiles(64, 64, 4, 1)},
    ("keys", 128): {AMPERE: Tiles(32, 64, 4, 1), HOPPER: Tiles(64, 64, 8, 1)},
    ("chunks", 64): {AMPERE: Tiles(64, 32, 4, 1)},
    ("chunks", 128): {AMPERE: Tiles(64, 32, 4, 1), BLACKWELL: Tiles(64, 32, 8, 1)},
    ("chunks_gradient", 64): {AMPERE: Tiles(64, 32, 4, 1), BLACKWELL: Tiles(64, 32, 8, 1)},
    ("chunks_gradient", 128): {AMPERE: Tiles(64, 32, 4, 1), BLACKWELL: Tiles(64, 32, 8, 1)},
    ("tokens_gradient", 64): {AMPERE: Tiles(64, 32, 8, 1), HOPPER: Tiles(64, 32, 4, 1)},
    ("tokens_gradient", 128): {
        AMPERE: Tiles(32, 32, 8, 1),
        HOPPER: Tiles(64, 16, 8, 1),
        BLACKWELL: Tiles(64, 32, 8, 1),
    },
    ("normalized_read_gradient", 64): {AMPERE: Tiles(64, 64, 8, 1), HOPPER: Tiles(64, 64, 4, 1)},
    ("normalized_read_gradient", 128): {AMPERE: Tiles(64, 128, 8, 1)},
    ("read_sums", 64): {AMPERE: Tiles(64, 64, 4, 1)},
    ("read_sums", 128): {AMPERE: Tiles(64, 128, 8, 1)},
}

_PACKED_TILES = {
    ("attend", 128): {
        AMPERE: Tiles(64, 32, 4, 3),
        HOPPER: Tiles(128, 64, 8, 3),
        BLACKWELL: Tiles(128, 32, 8, 3),
    },
    ("query_gradient", 128): {
        AMPERE: Tiles(64, 64, 8, 2),
        HOPPER: Tiles(128, 32, 8, 3),
        BLACKWELL: Tiles(128, 64, 8, 2),
    },
    ("key_gradient", 128): {
        AMPERE: Tiles(32, 64, 8, 2),
        HOPPER: Tiles(64, 64, 8, 2),
        BLACKWELL: Tiles(128, 64, 8, 1),
    },
}
"""Of kernels that would spill in packed segments with the tiles above: one generation of each."""

_SLIDING_TILES = {
    ("attend", 128): {
        AMPERE: Tiles(64, 64, 8, 2),
        HOPPER: Tiles(128, 64, 8, 3),
        BLACKWELL: Tiles(128, 32, 8, 3),
    },
    ("query_gradient", 64): {AMPERE: Tiles(128, 32, 8, 2), HOPPER: Tiles(128, 64, 8, 2)},
}
"""The same of sliding windows."""
