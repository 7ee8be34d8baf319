"""`infini-ds preflight`: checks that every host is ready for a run, before anything slow starts."""

import importlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from infini_ds import config as configuration
from infini_ds.cluster.findings import Finding, Host, judge
from infini_ds.cluster.gather import gather
from infini_ds.cluster.hostfile import read_hostfile
from infini_ds.cluster.preflight_host import versions
from infini_ds.cluster.slurm import nodes_of_job
from infini_ds.cluster.way import Way, over_srun, over_ssh, to_here
from infini_ds.errors import UserError
from infini_ds.system.console import Console
from infini_ds.system.figures import write_figures

_ROWS_OF_A_CHECK = 3
_COLOURS = {"good": "green", "warning": "yellow", "failed": "red"}


def run(
    config_path: str,
    overrides: Sequence[str] = (),
    hostfile: str | None = None,
    json_path: str | None = None,
    quiet: bool = False,
) -> None:
    """Checks all hosts at once, prints a table and a closing line, and writes the figures.

    Each host reads the config from the same path as this one, as it will in the run.

    Args:
        hostfile: a DeepSpeed hostfile of hosts that ssh reaches; None means the nodes of the Slurm
            job that this process belongs to, reached by srun, or this host alone.
        quiet: print no table if all is good.

    Raises:
        UserError: the config or the hostfile is wrong, or a check failed.
    """
    began = time.monotonic()
    config = configuration.load(config_path, list(overrides))
    slots, ways = _hosts(hostfile)
    here = versions()
    with ThreadPoolExecutor(1) as background:
        # The module needs torch, which loads while the hosts are being asked.
        background.submit(importlib.import_module, "infini_ds.planning.estimate")
        facts, lost = gather(ways, config_path, list(overrides))
    hosts = [
        Host(name, count or facts[name].get("processes", 1), facts[name], lost.get(name))
        for name, count in slots.items()
    ]
    findings = list(judge(config, here, hosts))
    seconds = time.monotonic() - began
    failed = [finding for finding in findings if finding.state == "failed"]
    warnings = sum(finding.state == "warning" for finding in findings)
    console = Console(must_be_read=True)
    if failed or warnings or not quiet:
        console.print(_table(findings))
    figures = {
        "good": not failed,
        "seconds": seconds,
        "findings": [finding._asdict() for finding in findings],
        "hosts": facts,
    }
    write_figures(json_path, figures)
    if failed:
        raise UserError(f"preflight: {one_line(failed)}")
    told = f"{len(hosts)} host{'s' * (len(hosts) > 1)} good"
    if warnings:
        told += f", {warnings} warning{'s' * (warnings > 1)}"
    console.print(f"preflight: {told} ({seconds:.1f} s)")


def _hosts(hostfile: str | None) -> tuple[dict[str, int], dict[str, Way]]:
    """Returns the number of processes of each host (0 if not given), and the way to each."""
    if hostfile:
        slots = read_hostfile(hostfile)
        return slots, {name: over_ssh(name) for name in slots}
    if nodes := nodes_of_job():
        return nodes, {name: over_srun(name) for name in nodes}
    return {"localhost": 0}, {"localhost": to_here()}


def one_line(failed: list[Finding]) -> str:
    """Summarizes the failed checks in one line, with the first one in full."""
    host, check, _, found, remedy = failed[0]
    where = "all hosts" if host == "all" else host
    told = f"{where}: {check}: {found}" + (f"; {remedy}" if remedy else "")
    others = dict.fromkeys(finding.host for finding in failed[1:])
    return f"{told} (and more in the table, of {_names([*others])})" if others else told


def _names(hosts: list[str]) -> str:
    """Names the first few hosts."""
    return ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more" if len(hosts) > 4 else "")


def _table(findings: list[Finding]) -> Table:
    """Builds a table: one row for all hosts with the same finding, and few rows of good ones."""
    alike: dict[tuple, list[str]] = {}
    for host, *rest in findings:
        alike.setdefault(tuple(rest), []).append(host)
    table = Table(box=SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in ("check", "", "hosts", "found"):
        table.add_column(heading, overflow="fold")
    shown: dict[str, int] = {}
    for (check, state, found, remedy), hosts in alike.items():
        if state == "good":
            shown[check] = shown.get(check, 0) + 1
            if shown[check] > _ROWS_OF_A_CHECK:
                continue
        text = f"{found}; {remedy}" if remedy else found
        table.add_row(check, Text(state, _COLOURS[state]), _names(hosts), text)
    return table
