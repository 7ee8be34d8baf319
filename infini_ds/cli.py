"""The command line: `infini-ds COMMAND ...`; one clear line and exit code 2 for mistakes."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from infini_ds import config as configuration
from infini_ds.errors import RunError, UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; the exit code: 0, 1 if a run could not go on, 2 for the user's mistakes."""
    parser = _parser()
    options, others = parser.parse_known_args(arguments)
    if others:  # argparse takes overrides only as far as the first option
        if "overrides" not in options or any(other.startswith("-") for other in others):
            parser.error(f"unrecognized arguments: {' '.join(others)}")
        options.overrides += others
    return exit_code(lambda: options.run(options))


def exit_code(command: Callable[[], None]) -> int:
    """Runs something and turns its errors into one line and a code."""
    try:
        command()
    except UserError as error:
        return _fail(error, 2)
    except RunError as error:
        return _fail(error, 1)
    return 0


def _fail(error: UserError | RunError, code: int) -> int:
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    # A mistake of the user is the same on all ranks; what ends a run may be known to one alone.
    if code == 2 and rank != "0":
        return code
    where = f" rank {rank}" if code == 1 and world != "1" else ""
    print(f"infini-ds{where}: {error}", file=sys.stderr, flush=True)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="infini-ds", description="Pretraining of Infini-Transformers on DeepSpeed."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    prepare = _with_config(commands, "prepare", "make the token store of a run's config", _prepare)
    prepare.add_argument("--force", action="store_true", help="replace an existing store")

    _with_config(
        commands, "pretrain", "train on this process; launch/pretrain.sh starts several", _pretrain
    )

    shown = commands.add_parser("config", help="print the reference of all settings, as Markdown")
    shown.set_defaults(run=lambda options: print(configuration.reference(), end=""))

    bench = commands.add_parser("bench", help="measure something, side by side")
    names = bench.add_subparsers(dest="name", required=True, metavar="NAME")
    peer = names.add_parser("peer", help="training speed and memory beside the seed library")
    peer.add_argument("--segments", default="512,1024,2048", help="segment lengths")
    peer.add_argument("--repeats", type=int, default=5, help="timed steps of each side")
    peer.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    peer.add_argument("--json", metavar="FILE", help="write the figures as well")
    peer.set_defaults(run=_bench_peer)
    transport = names.add_parser("transport", help="bytes and step time of both transports")
    transport.add_argument("--processes", type=int, default=2)
    transport.add_argument("--steps", type=int, default=10, help="timed steps of each")
    transport.add_argument("--json", metavar="FILE", help="write the figures as well")
    transport.set_defaults(run=_bench_transport)
    return parser


def _with_config(commands, name: str, about: str, run) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=about, description=about)
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="settings that replace the file's"
    )
    parser.set_defaults(run=run)
    return parser


# Commands import what they need when they run: a mistake in a config is told before torch loads.


def _prepare(options: argparse.Namespace) -> None:
    config = configuration.load(options.config, options.overrides)
    from infini_ds.data.prepare import prepare

    prepare(config.data, force=options.force)


def _pretrain(options: argparse.Namespace) -> None:
    config = configuration.load(options.config, options.overrides)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    config.data_parallel_size(world)
    if world == 1:  # what one of several ranks finds alone, it must tell the others
        from infini_ds.data.opening import open_data

        open_data(config)
    from infini_ds.training.trainer import pretrain

    try:
        pretrain(config)
    except RunError as error:
        code = _fail(error, 1)
        sys.stdout.flush()
        # Other ranks may be gone, so the process group cannot be closed, and an open one's threads
        # may abort the interpreter's own exit.
        os._exit(code)


def _bench_peer(options: argparse.Namespace) -> None:
    from infini_ds.benchmarks import peer

    peer.run(options.json, _integers(options.segments), options.repeats, options.dtype)


def _bench_transport(options: argparse.Namespace) -> None:
    from infini_ds.benchmarks import transport

    transport.run(options.processes, options.steps, options.json)


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{text!r}: must be integers with commas between them") from None


if __name__ == "__main__":
    sys.exit(main())
