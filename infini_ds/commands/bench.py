"""`infini-ds bench`: measures alternatives side by side."""

import argparse

from infini_ds.benchmarks.quality_variants import VARIANTS
from infini_ds.commands import recall
from infini_ds.commands.options import (
    Commands,
    add_json,
    check_distinct,
    command,
    distinct,
    integers,
    load_config,
    with_config,
    writable,
)
from infini_ds.errors import UserError
from infini_ds.system.arguments import Checked, at_least
from infini_ds.system.paths import argument

_PLOT = "quality.png"


def add(commands: Commands) -> None:
    """Adds this command to the parser."""
    parser = commands.add_parser("bench", help="measure alternatives side by side")
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for add_name in (
        _add_peer,
        _add_transport,
        _add_engines,
        _add_save,
        _add_packing,
        _add_context,
        _add_kernels,
        _add_quality,
        recall.add,
    ):
        add_name(names)


def _add_peer(names: Commands) -> None:
    parser = command(names, "peer", "training speed and memory beside the seed library", _peer)
    parser.add_argument(
        "--segments", action=Checked, check=integers, default=[512, 1024, 2048],
        help="segment lengths",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5, help="number of timed steps on each side")
    _add_dtype(parser)
    add_json(parser)


def _peer(options: argparse.Namespace) -> None:
    from infini_ds.benchmarks import peer

    peer.run(options.json, options.segments, options.repeats, options.dtype)


def _add_transport(names: Commands) -> None:
    parser = command(names, "transport", "bytes and step time of both transports", _transport)
    parser.set_defaults(is_rank=True)
    parser.add_argument("--processes", type=int, action=Checked, check=at_least(1), default=2)
    parser.add_argument(
        "--steps", type=int, action=Checked, check=at_least(1), default=10,
        help="number of timed steps with each",
    )  # fmt: skip
    _add_dtype(parser)
    add_json(parser)


def _transport(options: argparse.Namespace) -> None:
    from infini_ds.benchmarks import transport

    transport.run(options.processes, options.steps, options.dtype, options.json)


def _add_engines(names: Commands) -> None:
    about = "training speed of a pipeline and of ZeRO 1, 2 and 3 on the same processes"
    parser = command(names, "engines", about, _engines)
    parser.set_defaults(is_rank=True)
    parser.add_argument("--processes", type=int, action=Checked, check=at_least(2), default=2)
    parser.add_argument(
        "--steps", type=int, action=Checked, check=at_least(1), default=10,
        help="number of timed steps with each",
    )  # fmt: skip
    _add_dtype(parser)
    add_json(parser)


def _engines(options: argparse.Namespace) -> None:
    from infini_ds.benchmarks import engines

    engines.run(options.processes, options.steps, options.dtype, options.json)


def _add_save(names: Commands) -> None:
    about = "how long a checkpoint keeps training waiting, in the background and not"
    parser = command(names, "save", about, _save)
    parser.set_defaults(is_rank=True)
    parser.add_argument("--processes", type=int, action=Checked, check=at_least(1), default=2)
    parser.add_argument(
        "--sizes", action=Checked, check=_multiples_of_64, default=[256, 512, 1024],
        help="hidden sizes of the models",
    )  # fmt: skip
    parser.add_argument(
        "--directory", action=Checked, check=argument, metavar="DIR",
        help="where to write checkpoints, which are deleted again (the system's temporary files)",
    )  # fmt: skip
    add_json(parser)


def _save(options: argparse.Namespace) -> None:
    from infini_ds.benchmarks import save

    save.run(options.processes, options.sizes, options.directory, options.json)


def _multiples_of_64(name: str, text: str) -> list[int]:
    sizes = distinct(64)(name, text)
    if any(size % 64 for size in sizes):
        raise UserError(f"{name} ({text}) must be multiples of 64, the width of a head")
    return sizes


def _add_packing(names: Commands) -> None:
    parser = command(names, "packing", "useful tokens and their speed, packed and not", _packing)
    parser.add_argument(
        "--segment-length", type=int, action=Checked, check=at_least(1), default=2048,
        help="tokens per segment",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=int, action=Checked, check=at_least(1), default=10,
        help="number of timed steps, packed and not",
    )  # fmt: skip
    _add_dtype(parser)
    add_json(parser)


def _packing(options: argparse.Namespace) -> None:
    from infini_ds.benchmarks import packing

    packing.run(options.segment_length, options.steps, options.dtype, options.json)


def _add_context(names: Commands) -> None:
    about = "windows on one rank and shared by several: speed, memory and bytes"
    parser = with_config(names, "context", about, _context)
    parser.set_defaults(is_rank=True)
    parser.add_argument(
        "--windows", action=Checked, check=integers, metavar="TOKENS", default=[],
        help="lengths of windows (the config's)",
    )  # fmt: skip
    parser.add_argument(
        "--ranks", action=Checked, check=distinct(1), default=[1, 2],
        help="numbers of ranks that share a window",
    )  # fmt: skip
    parser.add_argument(
        "--repeats", type=int, action=Checked, check=at_least(1), default=3,
        help="number of starts of each",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=int, action=Checked, check=at_least(1), default=2,
        help="timed steps of a start, of which the first of several warms up",
    )  # fmt: skip
    add_json(parser)


def _context(options: argparse.Namespace) -> None:
    config = load_config(options)
    from infini_ds.benchmarks import context

    source = context.Source(options.config, options.overrides, config)
    starts = context.Starts(options.repeats, options.steps)
    context.run(source, options.windows, options.ranks, starts, options.json)


def _add_kernels(names: Commands) -> None:
    parser = command(names, "kernels", "speed of the Triton kernels on a GPU", _kernels)
    parser.add_argument(
        "--compile-only", action="store_true",
        help="no GPU needed: compile them for A100, H100 and B200, check the machine code",
    )  # fmt: skip
    add_json(parser)


def _kernels(options: argparse.Namespace) -> None:
    if options.compile_only:
        from infini_ds.benchmarks import kernels_compile

        kernels_compile.run(options.json)
        return
    from infini_ds.benchmarks import kernels

    kernels.run(options.json)


def _add_quality(names: Commands) -> None:
    about = "what the memory is worth in bits per byte of held-out text"
    parser = with_config(names, "quality", about, _quality)
    parser.add_argument("--steps", type=int, help="steps of each run (the config's train.steps)")
    parser.add_argument(
        "--seeds", action=Checked, check=distinct(0), default=[0, 1],
        help="seeds for weights and order of documents",
    )  # fmt: skip
    parser.add_argument(
        "--variants", action=Checked, check=_variants, metavar="NAMES", default=list(VARIANTS),
        help=f"default: {','.join(VARIANTS)}",
    )  # fmt: skip
    add_json(parser)
    parser.add_argument(
        "--plot", action=Checked, check=writable, metavar="FILE",
        help=f"picture of bits per byte by position in the document ({_PLOT})",
    )  # fmt: skip


def _variants(name: str, text: str) -> list[str]:
    variants = text.split(",")
    for variant in variants:
        if variant not in VARIANTS:
            raise UserError(f"{name} ({variant}) must be among {', '.join(VARIANTS)}")
    check_distinct(name, variants)
    return variants


def _quality(options: argparse.Namespace) -> None:
    steps = [] if options.steps is None else [f"train.steps={options.steps}"]
    config = load_config(options, *steps)
    plot = options.plot or writable("--plot", _PLOT)
    from infini_ds.benchmarks import quality

    quality.run(config, options.variants, options.seeds, options.json, plot)


def _add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto")
