"""Hosts whose own name stands for an address that the others do not reach."""

import pytest

from tests.cluster.conftest import FP32, LIMIT
from tests.cluster.test_ssh import ROOT, launch
from tests.distributed.conftest import SCRIPT, Run
from tests.distributed.processes import Processes

PORT = "29555"


@pytest.fixture(params=["loopback", pytest.param("another_interface", marks=pytest.mark.slow)])
def misnamed(hosts, request):
    """Two hosts, each with its own name at 127.0.1.1, as Debian has it, or at an address apart."""
    usual = (hosts.folder / "hosts").read_text()
    apart = request.param == "another_interface"
    for number, host in enumerate(hosts.all[:2], 1):
        address = f"10.99.{number}.1" if apart else "127.0.1.1"
        if apart:
            host.run("ip", "link", "add", "apart", "type", "bridge")
            host.run("ip", "address", "add", f"{address}/24", "dev", "apart")
            host.run("ip", "link", "set", "apart", "up")
        file = hosts.folder / f"hosts.{host.name}"
        file.write_text(f"{address} {host.name}\n{usual}")
        host.run("mount", "--bind", str(file), "/etc/hosts")
        assert host.run("getent", "ahostsv4", host.name).startswith(f"{address} ")
    yield hosts
    for host in hosts.all[:2]:
        host.run("umount", "/etc/hosts")
        if apart:
            host.run("ip", "link", "del", "apart")


def test_they_train_over_ssh(misnamed, tmp_path, data, alone):
    run = Run(tmp_path, data, **FP32)
    with launch(misnamed, 2, run) as launcher:
        assert launcher.wait(LIMIT) == [0], launcher.outputs()
    assert run.losses == pytest.approx(alone.losses, rel=1e-5)


@pytest.mark.parametrize("misnamed", ["loopback"], indirect=True)
def test_they_meet_at_the_name_of_the_first(misnamed, tmp_path, data, alone):
    run = Run(tmp_path, data, **FP32)
    started = []
    for rank, host in enumerate(misnamed.all[:2]):
        meeting = ["--master-addr", "node-1", "--master-port", PORT]
        torchrun = ["torchrun", "--nnodes", "2", "--node-rank", str(rank), *meeting]
        command = [*torchrun, str(SCRIPT), str(run.config)]
        started.append(host.start(*command, log=tmp_path / f"{host.name}.log", cwd=ROOT))
    with Processes(started) as launchers:
        assert launchers.wait(LIMIT) == [0, 0], launchers.outputs()
    assert run.losses == pytest.approx(alone.losses, rel=1e-5)
