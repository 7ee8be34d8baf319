"""The command line: `infini-ds COMMAND ...`; one clear line and exit code 2 for mistakes."""

import argparse
import contextlib
import math
import os
import sys
import typing
from collections.abc import Sequence
from pathlib import Path

import infini_ds
from infini_ds import config as configuration
from infini_ds.benchmarks.quality_variants import VARIANTS
from infini_ds.errors import RunError, SharedError, UserError
from infini_ds.system import environment
from infini_ds.system.exit_code import exit_code, fail
from infini_ds.system.paths import argument
from infini_ds.system.whole_file import check_writable

_MOST_PROCESSES = 10**6
_POSITIONAL = {"config", "destination", "directory", "document", "path", "source"}
_PATHS = _POSITIONAL | {
    "diff", "documents", "hostfile", "json", "memory", "output", "plot", "prompt_file",
}  # fmt: skip
"""Names of all arguments that are paths."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; the exit code is that of `exit_code`."""
    if arguments is None:
        environment.use_utf8()
    return exit_code(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> None:
    parser = _parser()
    options, others = parser.parse_known_args(arguments)
    if others:  # argparse takes overrides only as far as the first option
        if "overrides" not in options or any(other.startswith("-") for other in others):
            parser.error(f"unrecognized arguments: {' '.join(others)}")
        options.overrides = [*options.overrides, *others]
    take_paths(options)
    if options.run not in (_pretrain, _bench_transport):
        environment.forget_launcher()
    environment.check_accelerator()
    environment.raise_file_limit()
    options.run(options)


def take_paths(options: argparse.Namespace) -> None:
    """Every path among the arguments as it is meant, see `paths.argument`.

    Raises:
        UserError: one of them is none.
    """
    for name in _PATHS & vars(options).keys():
        given = getattr(options, name)
        shown = name if name in _POSITIONAL else f"--{name.replace('_', '-')}"
        if isinstance(given, list):
            setattr(options, name, [argument(shown, each) for each in given])
        elif isinstance(given, str):  # the memory of a device is a number
            setattr(options, name, argument(shown, given))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="infini-ds", description="Pretraining of Infini-Transformers on DeepSpeed."
    )
    parser.add_argument("--version", action="version", version=f"infini-ds {infini_ds.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    prepare = _with_config(commands, "prepare", "make the token store of a run's config", _prepare)
    prepare.add_argument("--force", action="store_true", help="replace an existing store")

    _with_config(
        commands, "pretrain", "train on this process; launch/pretrain.sh starts several", _pretrain
    )

    plan = _with_config(
        commands, "plan", "what a run needs on so many devices, without having them", _plan
    )
    plan.add_argument("--processes", type=int, required=True, help="one a device")
    plan.add_argument("--memory", type=float, metavar="GIB", help="of a device: what does not fit")
    plan.add_argument("--tflops", type=float, help="TFLOP/s that a device sustains: for times")
    plan.add_argument("--json", metavar="FILE", help="write the figures as well")

    preflight = _with_config(
        commands, "preflight", "check that every host is ready for a run", _preflight
    )
    preflight.add_argument(
        "--hostfile", metavar="FILE", help="its hosts, by ssh (this Slurm job's, or this host)"
    )
    preflight.add_argument("--quiet", action="store_true", help="one line if all is good")
    preflight.add_argument("--json", metavar="FILE", help="write the figures as well")

    status = commands.add_parser("status", help="how a run fares, from its files alone")
    status.add_argument("directory", metavar="RUN", help="output_dir of a run")
    status.add_argument("--json", metavar="FILE", help="write the figures as well")
    status.set_defaults(run=_status)

    passkey = _with_model(
        commands, "passkey", "can a model find digits that it read long ago", _passkey
    )
    passkey.add_argument("--segments", default="16,64,256,1024,8192", help="lengths of documents")
    passkey.add_argument("--depths", type=int, default=10, help="places where the key is hidden")
    passkey.add_argument("--samples", type=int, help="documents of each length (64, long ones 8)")
    passkey.add_argument("--filler", help="standard, noise or text (the run's data.passkey.filler)")
    passkey.add_argument("--keys", type=int, help="keys in each (the run's data.passkey.keys)")
    passkey.add_argument("--batch", type=int, help="documents read together (8)")
    passkey.add_argument("--seed", type=int, default=0, help="of the documents")
    passkey.add_argument("--json", metavar="FILE", help="write the figures as well")
    passkey.add_argument(
        "--plot", metavar="FILE", help="the heat map (passkey.png, in the run or here)"
    )

    _add_convert(commands)

    generate = _with_model(commands, "generate", "continue a prompt with a model", _generate)
    prompt = generate.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="of any length")
    prompt.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="the same from a file (.gz, .zst), or - for standard input",
    )
    generate.add_argument(
        "--memory", metavar="FILE", help="of a document that the prompt goes on with, by memorize"
    )
    generate.add_argument(
        "--max-new-tokens", type=int, default=256, help="at most so many (%(default)s)"
    )
    heat = generate.add_mutually_exclusive_group()
    heat.add_argument("--temperature", type=float, default=1.0, help="of sampling (%(default)s)")
    heat.add_argument(
        "--greedy", dest="temperature", action="store_const", const=0.0,
        help="always the likeliest token",
    )  # fmt: skip
    generate.add_argument(
        "--top-p", type=float, default=1.0,
        help="sample among the likeliest tokens that together have this probability (%(default)s)",
    )  # fmt: skip
    generate.add_argument(
        "--top-k", type=int, default=0, help="sample among so many tokens (%(default)s: all)"
    )
    generate.add_argument("--seed", type=int, help="of the sampling (another one each time)")
    generate.add_argument("--stop", metavar="TEXT", default="", help="end before this text")

    memorize = _with_model(
        commands, "memorize", "read a document and keep the model's memory of it", _memorize
    )
    memorize.add_argument(
        "document",
        metavar="FILE",
        help="text of any length, plain, .gz or .zst, or - for standard input",
    )
    memorize.add_argument(
        "-o", "--output", metavar="FILE", required=True, help="the memory, for generate --memory"
    )
    memorize.add_argument("--force", action="store_true", help="replace an existing file")

    evaluate = _with_model(
        commands,
        "evaluate",
        "loss of documents by position, with the memory and ablated",
        _evaluate,
    )
    evaluate.add_argument(
        "--documents", metavar="FILE", nargs="+", default=[],
        help="files or globs as in data.files, or - for one on standard input (the run's held-out "
        "documents)",
    )  # fmt: skip
    evaluate.add_argument(
        "--corpus", metavar="NAME", default="", help="whose held-out documents, in a mixture"
    )
    evaluate.add_argument("--json", metavar="FILE", help="write the figures as well")
    evaluate.add_argument(
        "--plot", metavar="FILE", help="the curve (evaluation.png, in the run or here)"
    )

    inspect = commands.add_parser(
        "inspect",
        help="what a run, checkpoint, export, store or memory file is, and if it is whole",
    )
    inspect.add_argument("path", metavar="PATH", help="of one of these")
    inspect.add_argument("--diff", metavar="OTHER", help="say how another one differs from it")
    inspect.add_argument("--json", metavar="FILE", help="write the figures as well")
    inspect.set_defaults(run=_inspect)

    settings = _with_config(
        commands, "config", "print all settings of a run, or without one what there are", _config,
        required=False,
    )  # fmt: skip
    settings.add_argument(
        "--schema", action="store_true", help="what there are, as a JSON schema for editors"
    )

    bench = commands.add_parser("bench", help="measure something, side by side")
    names = bench.add_subparsers(dest="name", required=True, metavar="NAME")
    peer = names.add_parser("peer", help="training speed and memory beside the seed library")
    peer.add_argument("--segments", default="512,1024,2048", help="segment lengths")
    peer.add_argument("--repeats", type=int, default=5, help="timed steps of each side")
    peer.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto")
    peer.add_argument("--json", metavar="FILE", help="write the figures as well")
    peer.set_defaults(run=_bench_peer)
    transport = names.add_parser("transport", help="bytes and step time of both transports")
    transport.add_argument("--processes", type=int, default=2)
    transport.add_argument("--steps", type=int, default=10, help="timed steps of each")
    transport.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto")
    transport.add_argument("--json", metavar="FILE", help="write the figures as well")
    transport.set_defaults(run=_bench_transport)
    kernels = names.add_parser("kernels", help="speed of the Triton kernels on a GPU")
    kernels.add_argument(
        "--compile-only", action="store_true",
        help="no GPU needed: compile them for A100, H100 and B200, check the machine code",
    )  # fmt: skip
    kernels.add_argument("--json", metavar="FILE", help="write the figures as well")
    kernels.set_defaults(run=_bench_kernels)
    quality = _with_config(
        names, "quality", "what the memory is worth in bits per byte of held-out text",
        _bench_quality,
    )  # fmt: skip
    quality.add_argument("--steps", type=int, help="of each run (the config's train.steps)")
    quality.add_argument("--seeds", default="0,1", help="of weights and order of documents")
    quality.add_argument(
        "--variants", metavar="NAMES", default=",".join(VARIANTS), help="default: %(default)s"
    )
    quality.add_argument("--json", metavar="FILE", help="write the figures as well")
    quality.add_argument(
        "--plot", metavar="FILE", default="quality.png",
        help="bits per byte by position in the document (%(default)s)",
    )  # fmt: skip
    return parser


def _with_config(
    commands, name: str, about: str, run, required: bool = True
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=about, description=about)
    nargs = None if required else "?"
    parser.add_argument("config", nargs=nargs, metavar="CONFIG", help="YAML file of the run")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key.path=value",
        help="settings that replace the file's",
    )  # fmt: skip
    parser.set_defaults(run=run)
    return parser


def _add_convert(commands) -> None:
    convert = commands.add_parser("convert", help="weights to and from other forms")
    directions = convert.add_subparsers(dest="direction", required=True, metavar="DIRECTION")
    for name, source, target, about in _CONVERSIONS:
        parser = directions.add_parser(name, help=about, description=about)
        parser.add_argument("source", metavar="SOURCE", help=source)
        parser.add_argument("destination", metavar="DESTINATION", help=target)
        parser.add_argument("--force", action="store_true", help="replace the destination")
        if name != "to-seed":
            parser.add_argument(
                "--shard-size", default="5GB", metavar="SIZE",
                help="largest file of a directory, such as 500MB (%(default)s)",
            )  # fmt: skip
        if name not in ("to-seed", "from-seed"):
            parser.add_argument(
                "--without-tokenizer", action="store_true",
                help="make a directory even if there is no tokenizer that can be read",
            )  # fmt: skip
        if name.startswith("to-"):
            parser.add_argument("--step", type=int, help="of the run's checkpoint (the newest)")
        if name in ("to-safetensors", "to-hf"):
            parser.add_argument(
                "--dtype", choices=("fp32", "bf16"),
                help="default: as stored; fp32 of a bf16 run are its optimizer's weights",
            )  # fmt: skip
        if name in ("from-llama", "from-seed"):
            parser.add_argument(
                "--segment-length", type=int, default=2048,
                help="tokens that attend to each other; the memory has those before (%(default)s)",
            )  # fmt: skip
            parser.add_argument(
                "--memory-rule", choices=("linear", "delta"), default="linear",
                help="how a segment is written into the memory (%(default)s)",
            )  # fmt: skip
        if name == "from-llama":
            parser.add_argument(
                "--gate-init", type=float, default=-4.0,
                help="beta of all gates: the memory's share is sigmoid(beta) (%(default)s, 1.8%%)",
            )  # fmt: skip
        parser.set_defaults(run=_convert)
    reshard = directions.add_parser(
        "reshard", help="ready a checkpoint to be resumed by another number of processes",
        description="Resuming does this by itself. Done before, no process has to wait for it.",
    )  # fmt: skip
    reshard.add_argument("directory", metavar="RUN", help="output_dir of a run, or a checkpoint")
    reshard.add_argument("--step", type=int, help="of the checkpoint (the newest valid one)")
    reshard.set_defaults(run=_reshard)


_MODEL = "an export, a run's output_dir, or one of its checkpoints"
_EXPORT = "directory of the export to make"
_CONVERSIONS = (
    ("from-seed", "state_dict (.safetensors or .pt)", _EXPORT, "from infini-transformer-pytorch"),
    ("to-seed", _MODEL, "file to make (.safetensors)", "to infini-transformer-pytorch"),
    (
        "from-llama", "directory of a checkpoint, or its name on the hub (ORGANISATION/MODEL)",
        _EXPORT, "from Hugging Face Llama, Mistral, Qwen2, Qwen3",
    ),
    ("to-llama", _MODEL, "directory to make", "to Hugging Face Llama or Qwen, without the memory"),
    ("to-hf", _MODEL, "directory to make", "to Hugging Face, with code for transformers to run it"),
    (
        "to-safetensors", _MODEL, "file (.safetensors) or directory to make",
        "to one file of weights, or to an export directory",
    ),
    (
        "from-safetensors", "file or directory with our weights", _EXPORT,
        "from a file of our weights to an export directory",
    ),
)  # fmt: skip


def _with_model(commands, name: str, about: str, run) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=about, description=about)
    parser.add_argument("directory", metavar="MODEL", help=_MODEL)
    parser.add_argument("--step", type=int, help="of the run's checkpoint (the newest valid one)")
    parser.set_defaults(run=run)
    return parser


# Commands import what they need when they run: a mistake in a config is told before torch loads.


def _prepare(options: argparse.Namespace) -> None:
    config = configuration.load(options.config, options.overrides)
    from infini_ds.data.prepare import prepare

    for corpus in config.data.corpora.values():
        prepare(corpus, force=options.force)


def _config(options: argparse.Namespace) -> None:
    if options.schema and options.config is not None:
        raise UserError("--schema: is that of all settings; leave out CONFIG")
    if options.schema:
        print(configuration.schema(), end="")
    elif options.config is None:
        print(configuration.reference(), end="")
    else:
        print(configuration.dump(configuration.load(options.config, options.overrides)), end="")


def _pretrain(options: argparse.Namespace) -> None:
    config = configuration.load(options.config, options.overrides)
    world = environment.world_size()
    config.data_parallel_size(world)
    if world == 1:  # what one of several ranks finds alone, it must tell the others
        from infini_ds.data.opening import open_data

        open_data(config)
    from infini_ds.training.trainer import pretrain

    code = 0
    try:
        pretrain(config)
    except RunError as error:
        code = fail(error, 1)
    except SharedError as error:
        if world == 1:
            raise
        code = fail(error, 2) if os.environ["RANK"] == "0" else 2
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    # After an error other ranks may be gone, so the process group cannot be closed; once in some
    # hundred runs its threads abort a process that closes it or exits with it; and in an orderly
    # exit a scheduler's SIGTERM, as another task has ended, would change the code.
    os._exit(code)


def _plan(options: argparse.Namespace) -> None:
    for name in ("processes", "memory", "tflops"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} ({value:g}) must be more than 0, and finite")
    if options.processes > _MOST_PROCESSES:
        raise UserError(f"--processes ({options.processes}) must be at most {_MOST_PROCESSES}")
    _check_directories(options, "json")
    from infini_ds.planning import report

    devices = report.Devices(options.processes, options.memory, options.tflops)
    report.run(options.config, options.overrides, devices, options.json)


def _preflight(options: argparse.Namespace) -> None:
    _check_directories(options, "json")
    from infini_ds.cluster import preflight

    preflight.run(options.config, options.overrides, options.hostfile, options.json, options.quiet)


def _status(options: argparse.Namespace) -> None:
    _check_directories(options, "json")
    from infini_ds.cluster import status

    status.run(options.directory, options.json)


def _passkey(options: argparse.Namespace) -> None:
    segments = _integers(options.segments)
    if min(segments) < 2:
        raise UserError(f"--segments ({options.segments}): must each be at least 2")
    for name in ("depths", "samples", "keys", "batch"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} ({value}) must be at least 1")
    if options.seed < 0:
        raise UserError(f"--seed ({options.seed}) must be at least 0")
    fillers = typing.get_args(configuration.PasskeyConfig.model_fields["filler"].annotation)
    if options.filler not in (None, *fillers):
        raise UserError(f"--filler ({options.filler}) must be one of {', '.join(fillers)}")
    _check_directories(options, "json", "plot")
    from infini_ds.evaluation import passkey

    asked = passkey.PasskeyOptions(
        segments, options.depths, options.samples, options.filler, options.keys, options.batch,
        options.seed,
    )  # fmt: skip
    passkey.run(options.directory, options.step, asked, options.json, options.plot)


def _convert(options: argparse.Namespace) -> None:
    name = options.direction
    if getattr(options, "segment_length", 1) < 1:
        raise UserError(f"--segment-length ({options.segment_length}) must be at least 1")
    size = _bytes("--shard-size", options.shard_size) if name != "to-seed" else 0
    from infini_ds.conversion import convert

    task = convert.Task(
        Path(options.source), Path(options.destination), options.force, size,
        getattr(options, "without_tokenizer", False),
    )  # fmt: skip
    if name == "from-seed":
        convert.from_seed(task, options.segment_length, options.memory_rule)
    elif name == "to-seed":
        convert.to_seed(task, options.step)
    elif name == "from-llama":
        convert.from_llama(task, options.segment_length, options.gate_init, options.memory_rule)
    elif name == "to-llama":
        convert.to_llama(task, options.step)
    elif name == "to-hf":
        convert.to_hf(task, options.dtype, options.step)
    elif name == "to-safetensors":
        convert.to_safetensors(task, options.dtype, options.step)
    else:
        convert.from_safetensors(task)


def _reshard(options: argparse.Namespace) -> None:
    from infini_ds.conversion.reshard import reshard

    reshard(Path(options.directory), options.step)


def _generate(options: argparse.Namespace) -> None:
    for name, good in (
        ("max_new_tokens", options.max_new_tokens >= 1),
        ("temperature", 0 <= options.temperature < math.inf),
        ("top_p", 0 < options.top_p <= 1),
        ("top_k", options.top_k >= 0),
        ("seed", options.seed is None or 0 <= options.seed < 2**63),
    ):
        if not good:
            option = name.replace("_", "-")
            raise UserError(f"--{option} ({getattr(options, name)}) is out of range")
    if options.prompt_file:
        _check_text("--prompt-file", options.prompt_file)
    if options.memory:
        _check_file("--memory", options.memory)
    from infini_ds.generation import generate

    asked = generate.GenerateOptions(
        options.prompt, options.prompt_file, options.memory, options.max_new_tokens,
        options.temperature, options.top_p, options.top_k, options.seed, options.stop,
    )  # fmt: skip
    generate.run(options.directory, options.step, asked)


def _memorize(options: argparse.Namespace) -> None:
    output = Path(options.output)
    _check_text("document", options.document)
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: its directory does not exist")
    if output.is_dir() or (output.exists() and not options.force):
        raise UserError(f"--output {output}: exists already; --force replaces a file")
    from infini_ds.generation import memorize

    memorize.run(options.directory, options.step, options.document, options.output)


def _evaluate(options: argparse.Namespace) -> None:
    _check_directories(options, "json", "plot")
    from infini_ds.evaluation import documents

    documents.run(
        options.directory, options.step, options.documents, options.corpus, options.json,
        options.plot,
    )  # fmt: skip


def _inspect(options: argparse.Namespace) -> None:
    _check_directories(options, "json")
    for path in filter(None, (options.path, options.diff)):
        if not Path(path).exists():
            raise UserError(f"inspect {path}: no such file or directory")
    from infini_ds.inspection import command

    command.run(options.path, options.diff, options.json)


def _bench_peer(options: argparse.Namespace) -> None:
    _check_directories(options, "json")
    from infini_ds.benchmarks import peer

    peer.run(options.json, _integers(options.segments), options.repeats, options.dtype)


def _bench_transport(options: argparse.Namespace) -> None:
    _check_directories(options, "json")
    from infini_ds.benchmarks import transport

    transport.run(options.processes, options.steps, options.dtype, options.json)


def _bench_kernels(options: argparse.Namespace) -> None:
    _check_directories(options, "json")
    if options.compile_only:
        from infini_ds.benchmarks import kernels_compile

        kernels_compile.run(options.json)
        return
    from infini_ds.benchmarks import kernels

    kernels.run(options.json)


def _bench_quality(options: argparse.Namespace) -> None:
    overrides = list(options.overrides)
    if options.steps is not None:
        overrides.append(f"train.steps={options.steps}")
    config = configuration.load(options.config, overrides)
    seeds = _integers(options.seeds)
    _check_directories(options, "json", "plot")
    from infini_ds.benchmarks import quality

    quality.run(config, options.variants.split(","), seeds, options.json, options.plot)


def _bytes(option: str, text: str) -> int:
    """A size such as 500MB or 5GB."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = text[:-2], text[-2:].upper()
    if not number.isdecimal() or unit not in units or int(number) < 1:
        raise UserError(f"{option} ({text}) must be a number with KB, MB or GB, such as 5GB")
    return int(number) * units[unit]


def _check_file(name: str, path: str) -> None:
    """There is such a file, whose size is known."""
    if not Path(path).is_file():
        problem = "must be a regular file" if Path(path).exists() else "no such file"
        raise UserError(f"{name} {path}: {problem}")


def _check_text(name: str, path: str) -> None:
    """There is such a file of text, which may be a pipe."""
    from infini_ds.data import text_files

    if not text_files.exists(path):
        problem = "is a directory; name a file" if Path(path).is_dir() else "no such file"
        raise UserError(f"{name} {path}: {problem}")


def _check_directories(options: argparse.Namespace, *names: str) -> None:
    """Files of these options can be written where they are wanted."""
    for name in names:
        path = getattr(options, name)
        if path and not Path(path).parent.is_dir():
            raise UserError(f"--{name} {path}: its directory does not exist")
        if path and Path(path).is_dir():
            raise UserError(f"--{name} {path}: is a directory; name a file")
        if path:
            check_writable(path, f"--{name}")


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{text!r}: must be integers with commas between them") from None


if __name__ == "__main__":
    sys.exit(main())
