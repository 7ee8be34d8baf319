"""Three hosts, whole again after each test, and the run that those on them must equal."""

import signal

import pytest

from tests.cluster.hosts import PROGRAMS, Hosts, missing
from tests.cluster.slurm import PROGRAMS as PROGRAMS_OF_SLURM
from tests.cluster.slurm import Slurm
from tests.distributed.conftest import Run, data  # noqa: F401

FP32 = {
    "train__dtype": "fp32", "train__steps": 8, "train__chunks": 1, "train__save_every": 4,
    "train__timeout": 60.0, "optimizer__eps": 1e-5, "optimizer__learning_rate": 1e-3,
    "model__num_layers": 3, "model__memory": {},
}  # fmt: skip
"""A run whose losses are the same in every layout."""
LIMIT = 300.0
"""Seconds that a run may take to start or to end, beside much other work on this machine."""
LAYOUTS = {
    "pipeline": "parallel.pipeline_stages=auto", "data": "parallel.pipeline_stages=1",
    "context": "parallel.context_parallel=2", "zero3": "parallel.zero_stage=3",
}  # fmt: skip
"""Overrides that lay the processes out one after another or side by side, or let them share
windows or weights."""


def require(what: str, programs: dict[str, str]) -> None:
    """Skips what this machine has not the right or the programs for."""
    reason = missing(programs)
    if reason:
        pytest.skip(f"{what} {reason}: make test-cluster")


@pytest.fixture(scope="session")
def all_hosts(tmp_path_factory):
    require("a cluster on one machine", PROGRAMS)
    folder = tmp_path_factory.mktemp("hosts")
    with Hosts(["node-1", "node-2", "node-3"], folder) as hosts:
        yield hosts


@pytest.fixture
def hosts(all_hosts) -> Hosts:
    """Three hosts that reach each other fast; what a test leaves running on them is killed."""
    yield all_hosts
    all_hosts.limit("10gbit")
    for host in all_hosts.all:
        all_hosts.join(host)
        if host.processes():
            host.send("", signal.SIGKILL)


@pytest.fixture(scope="session")
def alone(tmp_path_factory, data) -> Run:  # noqa: F811
    """A run of one process."""
    run = Run(tmp_path_factory.mktemp("alone"), data, **FP32)
    run.finish(1)
    assert sorted(run.losses) == list(range(1, 9))
    return run


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    require("Slurm on one machine", PROGRAMS_OF_SLURM)
    folder = tmp_path_factory.mktemp("slurm")
    with Hosts(["node-1", "node-2"], folder) as hosts, Slurm(hosts, folder) as cluster:
        yield cluster
