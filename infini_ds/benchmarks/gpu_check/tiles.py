"""Finds the fastest tiles of each kernel."""

from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

from infini_ds.benchmarks.cuda_timer import CudaTimer
from infini_ds.benchmarks.gpu_check.compiling import OF_TINY, without_gpu
from infini_ds.benchmarks.gpu_check.results import Part
from infini_ds.benchmarks.kernels_timing import Shape, make_call
from infini_ds.kernels.infini_attention.triton import op, window
from infini_ds.kernels.infini_attention.triton.tuning import Tiles
from infini_ds.kernels.infini_attention.triton.tuning import tiles as chosen
from infini_ds.kernels.launch import HOPPER

HEADS, HEAD_DIM = 32, 128
LENGTHS, TINY_LENGTHS = (2048, 512), (128, 64)
CANDIDATES = {
    "attend": [(128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3),
               (128, 32, 8, 3), (64, 32, 4, 4)],
    "query_gradient": [(128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 8, 2),
                       (128, 64, 8, 1), (64, 32, 4, 3), (128, 128, 8, 1)],
    "key_gradient": [(32, 128, 8, 2), (64, 64, 8, 2), (32, 64, 4, 3), (32, 64, 4, 2),
                     (64, 128, 8, 1), (64, 64, 4, 1)],
    "sums": [(64, 128, 8, 1), (64, 64, 8, 1), (32, 128, 8, 1), (32, 64, 4, 1)],
    "write_gradient": [(64, 16, 8, 1), (64, 32, 8, 1), (64, 64, 8, 1), (64, 128, 8, 1)],
    "read_gradient": [(64, 128, 8, 1), (32, 128, 4, 1)],
    "overlap": [(64, 128, 8, 2), (128, 128, 8, 2), (64, 128, 8, 3)],
    "overlap_gradient": [(64, 32, 8, 1), (64, 64, 8, 1), (128, 32, 8, 1), (64, 32, 4, 1)],
}  # fmt: skip
"""Rows, columns, warps and stages to try beside those in tuning.py.

With Triton 3.6 for Hopper, all compile without spills except the last two of key_gradient (40 and
72 bytes). `sums` is limited to one stage: with more, its code overwrites registers of unfinished
products.
"""
BY_ROWS = ("attend", "query_gradient", "read_gradient", "write_gradient")
"""Kernels whose grid's first dimension counts tiles of rows."""


class Start(NamedTuple):
    """The launch of one kernel with one candidate."""

    name: str
    tile: Tiles
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]


def tiles_compile(part: Part, worker: str, workers: str) -> None:
    """Compiles every workers-th candidate into the cache."""
    with without_gpu():
        for place, start in enumerate(_starts(512, "cpu", runs=False)):
            if place % int(workers) != int(worker) or part.late():
                continue
            if part.tiny and start.kernel.__name__ not in OF_TINY:
                continue
            try:
                start.kernel.run(
                    grid=start.grid, warmup=True, **start.arguments, **start.tile.options
                )
            except Exception as error:  # compilers raise errors of many kinds
                print(start.name, start.tile, str(error)[:200], flush=True)


def tiles(part: Part) -> None:
    """Times all candidates; without a GPU, only checks that the kernels still accept them."""
    timer = CudaTimer(seconds=0.3, repeats=20)
    for n in TINY_LENGTHS if part.tiny else LENGTHS:
        found: dict[str, dict[str, float]] = {}
        for start in _starts(n, part.device, runs=not part.tiny):
            if part.late():
                break
            about = {"n": n, "kernel": start.name, "tile": start.tile}
            try:
                took = 0.0 if part.tiny else timer(lambda: _launch(start))  # noqa: B023
            except Exception as error:  # the tile does not fit, or does not compile
                part.note("tile", **about, error=str(error)[:120])
                continue
            part.note("tile", **about, us=1e6 * took)
            found.setdefault(start.name, {})[str(tuple(start.tile))] = round(1e6 * took, 1)
        for name, times in found.items():
            fastest = dict(sorted(times.items(), key=lambda item: item[1]))
            part.note("tiles", n=n, kernel=name, us=fastest)


def _launch(start: Start) -> None:
    start.kernel[start.grid](**start.arguments, **start.tile.options)


def _starts(n: int, device: str, runs: bool) -> Iterator[Start]:
    """Yields the launch of every kernel in one delta rule call, with each candidate.

    Args:
        runs: whether to make the call, so that the kernels get real numbers.
    """
    started: dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]] = {}
    launch = window.launch

    def record(kernel, grid, options, **arguments) -> None:
        name = kernel.__name__.removesuffix("_kernel")
        started.setdefault(name, (kernel, grid, arguments))
        if runs:
            launch(kernel, grid, options, **arguments)

    shape = Shape(16 if runs else 2, n, HEADS, HEAD_DIM, "delta")
    with mock.patch.object(window, "launch", record):
        make_call(op.infini_attention_triton, shape, device, "backward")()
    for name, candidates in CANDIDATES.items():
        kernel, grid, arguments = started[name]
        now = chosen(name, HEAD_DIM, 2, HOPPER)
        for tile in dict.fromkeys((now, *(Tiles(*each) for each in candidates))):
            yield Start(name, tile, kernel, _grid(name, grid, tile, n), _with(arguments, tile))


def _with(arguments: dict[str, Any], tile: Tiles) -> dict[str, Any]:
    sizes = {"BLOCK_M": tile.rows, "BLOCK_ROWS": tile.rows,
             "BLOCK_N": tile.columns, "BLOCK_V": tile.columns}  # fmt: skip
    return arguments | {name: size for name, size in sizes.items() if name in arguments}


def _grid(name: str, grid: tuple[int, ...], tile: Tiles, n: int) -> tuple[int, ...]:
    if name in BY_ROWS:
        return -(-n // tile.rows), *grid[1:]
    if name == "key_gradient":
        return -(-n // tile.columns), *grid[1:]
    if name == "sums":
        return HEAD_DIM // tile.columns, *grid[1:]
    return grid
