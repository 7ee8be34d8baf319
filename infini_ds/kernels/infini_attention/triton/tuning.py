"""Tile sizes, warps and pipeline stages of each kernel on each generation of GPUs.

All were chosen so that nothing spills (`infini-ds bench kernels --compile-only` shows it); which
of those is the fastest takes a GPU to tell.
"""

from typing import NamedTuple

from infini_ds.kernels.launch import AMPERE, BLACKWELL, HOPPER, RTX_BLACKWELL


class Tiles(NamedTuple):
    """Of one kernel."""

    rows: int
    """Queries, or tokens of a sum."""
    columns: int
    """Keys, or columns of a memory."""
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """How to start the kernel."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def tiles(kernel: str, d: int, itemsize: int, generation: int, packed: bool = False) -> Tiles:
    """Of a kernel by its name, for head size d, operands of `itemsize` bytes, and segments that
    are packed or not.

    Generations that are not in the table take what the nearest older one has; RTX_BLACKWELL has the
    matrix instructions of AMPERE and 99 KiB of shared memory, and takes AMPERE's, of which some
    kernels may then spill a little. fp32 is there to be exact, not to be fast: small tiles.
    """
    if itemsize == 4:
        return Tiles(32, 32, 4, 1)
    if generation >= RTX_BLACKWELL:
        generation = AMPERE
    of_generation = (_PACKED_TILES if packed else {}).get((kernel, d)) or _TILES[kernel, d]
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
    # Of more stages Triton 3.6 and 3.7 make code for Hopper that writes the next weighted rows into
    # registers which products still read, where heads are grouped.
    ("sums", 64): {
        AMPERE: Tiles(32, 64, 4, 3),
        HOPPER: Tiles(64, 64, 4, 1),
        BLACKWELL: Tiles(64, 64, 4, 2),
    },
    ("sums", 128): {AMPERE: Tiles(64, 128, 8, 2), HOPPER: Tiles(64, 128, 8, 1)},
    # The compiler of Triton 3.6 crashes on more stages for Blackwell.
    ("overlap", 64): {AMPERE: Tiles(64, 64, 4, 2), BLACKWELL: Tiles(64, 64, 4, 1)},
    ("overlap", 128): {AMPERE: Tiles(64, 128, 8, 2), BLACKWELL: Tiles(64, 128, 8, 1)},
    ("delta", 64): {AMPERE: Tiles(64, 32, 4, 1)},
    ("delta", 128): {AMPERE: Tiles(128, 32, 8, 1)},
    ("delta_gradient", 64): {AMPERE: Tiles(64, 32, 4, 1)},
    ("delta_gradient", 128): {AMPERE: Tiles(128, 32, 8, 1)},
    ("overlap_gradient", 64): {AMPERE: Tiles(64, 32, 4, 1)},
    ("overlap_gradient", 128): {AMPERE: Tiles(32, 32, 8, 1), HOPPER: Tiles(64, 32, 8, 1)},
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
