"""The command line `infini-ds COMMAND ...`: a mistake gives one clear line and exit code 2."""

import argparse
import sys
from collections.abc import Sequence

import infini_ds
from infini_ds.commands import (
    babilong,
    bench,
    config,
    configs,
    convert,
    evaluate,
    generate,
    inspect,
    memorize,
    passkey,
    plan,
    preflight,
    prepare,
    pretrain,
    report,
    status,
)
from infini_ds.system import environment
from infini_ds.system.exit_code import exit_code

_COMMANDS = (
    prepare, pretrain, plan, preflight, status, report, passkey, babilong, convert, generate,
    memorize, evaluate, inspect, config, configs, bench,
)  # fmt: skip
"""The commands in the order in which the help lists them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; see `exit_code`."""
    if arguments is None:
        environment.use_utf8()
    return exit_code(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> None:
    parser = _parser()
    options, others = parser.parse_known_args(arguments)
    if others:  # argparse accepts overrides only up to the first option
        if "overrides" not in options or any(other.startswith("-") for other in others):
            parser.error(f"unrecognized arguments: {' '.join(others)}")
        options.overrides = [*options.overrides, *others]
    if not options.is_rank:
        environment.forget_launcher()
    environment.check_accelerator()
    environment.raise_file_limit()
    options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="infini-ds", description="Pretraining of Infini-Transformers on DeepSpeed."
    )
    parser.set_defaults(is_rank=False)  # True for a command that may run as a launcher's rank
    parser.add_argument("--version", action="version", version=f"infini-ds {infini_ds.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
