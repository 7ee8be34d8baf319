"""`infini-ds plan`: shows what a run needs, on devices that do not have to exist."""

import argparse
import math

from infini_ds.commands.options import Commands, add_json, with_config
from infini_ds.errors import UserError
from infini_ds.system.arguments import Checked

_MOST_PROCESSES = 10**6


def add(commands: Commands) -> None:
    """Adds this command to the parser."""
    about = "show what a run needs on a number of devices, without having them"
    parser = with_config(commands, "plan", about, _run)
    parser.add_argument(
        "--processes", type=int, action=Checked, check=_processes, required=True,
        help="number of processes, one per device",
    )  # fmt: skip
    parser.add_argument(
        "--memory", type=float, action=Checked, check=_positive, metavar="GIB",
        help="memory of each device, to show what does not fit",
    )  # fmt: skip
    parser.add_argument(
        "--tflops", type=float, action=Checked, check=_positive,
        help="TFLOP/s that each device sustains, to show times",
    )  # fmt: skip
    add_json(parser)


def _positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise UserError(f"{name} ({value:g}) must be more than 0, and finite")
    return value


def _processes(name: str, count: int) -> int:
    _positive(name, count)
    if count > _MOST_PROCESSES:
        raise UserError(f"{name} ({count}) must be at most {_MOST_PROCESSES}")
    return count


def _run(options: argparse.Namespace) -> None:
    from infini_ds.planning import report

    devices = report.Devices(options.processes, options.memory, options.tflops)
    report.run(options.config, options.overrides, devices, options.json)
