"""`infini-ds convert`: converts weights to other formats, and a checkpoint to another layout."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from infini_ds.commands.options import MODEL, Commands, command, size
from infini_ds.system.arguments import Checked, at_least
from infini_ds.system.paths import argument

_LARGEST_FILE = 5 * 10**9
_EXPORT = "directory of the export to make"
_RULES_OF_SEED = ("linear", "delta")
_RULES = (*_RULES_OF_SEED, "gated_delta", "gated_delta_dpfp")


def add(commands: Commands) -> None:
    """Adds this command to the parser."""
    parser = commands.add_parser("convert", help="convert weights to and from other formats")
    directions = parser.add_subparsers(dest="direction", required=True, metavar="DIRECTION")
    for direction in _DIRECTIONS:
        _add_direction(directions, direction)
    reshard = directions.add_parser(
        "reshard", help="prepare a checkpoint for resuming with another number of processes",
        description="Resuming does this by itself; done beforehand, no process has to wait for it.",
    )  # fmt: skip
    reshard.add_argument(
        "directory", action=Checked, check=argument, metavar="RUN",
        help="output_dir of a run, or a checkpoint",
    )  # fmt: skip
    reshard.add_argument("--step", type=int, help="step of the checkpoint (the newest valid one)")
    reshard.set_defaults(run=_reshard)


class _Direction(NamedTuple):
    """A format that weights are converted to or from."""

    name: str
    source: str
    target: str
    about: str
    options: tuple[Callable[[argparse.ArgumentParser], None], ...]
    """Functions that each add an option that not all directions have."""
    run: Callable[[Any, Any, argparse.Namespace], None]
    """Calls the conversion module with the task and the options."""


def _add_direction(directions: Commands, direction: _Direction) -> None:
    def run(options: argparse.Namespace) -> None:
        from infini_ds.conversion import convert
        from infini_ds.conversion.task import Task

        task = Task(
            Path(options.source), Path(options.destination), options.force, options.shard_size,
            options.without_tokenizer,
        )  # fmt: skip
        direction.run(convert, task, options)

    parser = command(directions, direction.name, direction.about, run)
    parser.set_defaults(shard_size=0, without_tokenizer=False)
    parser.add_argument(
        "source", action=Checked, check=argument, metavar="SOURCE", help=direction.source
    )
    parser.add_argument(
        "destination", action=Checked, check=argument, metavar="DESTINATION", help=direction.target
    )
    parser.add_argument("--force", action="store_true", help="replace the destination")
    for add_option in direction.options:
        add_option(parser)


def _shard_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shard-size", action=Checked, check=size, default=_LARGEST_FILE, metavar="SIZE",
        help=f"largest file in a directory, such as 500MB ({_LARGEST_FILE // 10**9}GB)",
    )  # fmt: skip


def _without_tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--without-tokenizer", action="store_true",
        help="make a directory even without a readable tokenizer",
    )  # fmt: skip


def _step(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--step", type=int, help="step of the run's checkpoint (the newest)")


def _dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"),
        help="default: as stored; for a bf16 run, fp32 takes the optimizer's weights",
    )  # fmt: skip


def _memory(rules: tuple[str, ...]) -> Callable[[argparse.ArgumentParser], None]:
    """Makes a function that adds the options of a memory by one of some rules."""

    def add_options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--segment-length", type=int, action=Checked, check=at_least(1), default=2048,
            help="tokens that attend to each other; earlier ones are in the memory (%(default)s)",
        )  # fmt: skip
        parser.add_argument(
            "--memory-rule", choices=rules, default="linear",
            help="how a segment is written into the memory (%(default)s)",
        )  # fmt: skip

    return add_options


def _gate_init(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gate-init", type=float, default=-4.0,
        help="beta of all gates: the memory's share is sigmoid(beta) (%(default)s, 1.8%%)",
    )  # fmt: skip


def _from_llama(convert, task, options: argparse.Namespace) -> None:
    convert.from_llama(task, options.segment_length, options.gate_init, options.memory_rule)


_DIRECTIONS = (
    _Direction(
        "from-seed", "state_dict (.safetensors or .pt)", _EXPORT,
        "from infini-transformer-pytorch", (_shard_size, _memory(_RULES_OF_SEED)),
        lambda convert, task, its: convert.from_seed(task, its.segment_length, its.memory_rule),
    ),
    _Direction(
        "to-seed", MODEL, "file to make (.safetensors)", "to infini-transformer-pytorch", (_step,),
        lambda convert, task, its: convert.to_seed(task, its.step),
    ),
    _Direction(
        "from-llama", "directory of a checkpoint, or its name on the hub (ORGANISATION/MODEL)",
        _EXPORT, "from Hugging Face Llama, Mistral, Qwen2, Qwen3",
        (_shard_size, _without_tokenizer, _memory(_RULES), _gate_init), _from_llama,
    ),
    _Direction(
        "to-llama", MODEL, "directory to make",
        "to Hugging Face Llama or Qwen, without the memory",
        (_shard_size, _without_tokenizer, _step),
        lambda convert, task, its: convert.to_llama(task, its.step),
    ),
    _Direction(
        "to-hf", MODEL, "directory to make",
        "to Hugging Face, with code for transformers to run it",
        (_shard_size, _without_tokenizer, _step, _dtype),
        lambda convert, task, its: convert.to_hf(task, its.dtype, its.step),
    ),
    _Direction(
        "to-safetensors", MODEL, "file (.safetensors) or directory to make",
        "to one file of weights, or to an export directory",
        (_shard_size, _without_tokenizer, _step, _dtype),
        lambda convert, task, its: convert.to_safetensors(task, its.dtype, its.step),
    ),
    _Direction(
        "from-safetensors", "file or directory with our weights", _EXPORT,
        "from a file of our weights to an export directory", (_shard_size, _without_tokenizer),
        lambda convert, task, its: convert.from_safetensors(task),
    ),
)  # fmt: skip


def _reshard(options: argparse.Namespace) -> None:
    from infini_ds.conversion.reshard import reshard

    reshard(Path(options.directory), options.step)
