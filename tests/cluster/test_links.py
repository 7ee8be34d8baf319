"""`infini-ds bench transport` between two hosts, on slow links; `pytest -s` shows its table."""

import json

import pytest

from tests.cluster.conftest import LIMIT
from tests.cluster.test_ssh import ROOT
from tests.distributed.processes import Processes


@pytest.mark.parametrize("rate", ["1gbit", "100mbit"])
def test_bytes_between_hosts_are_those_of_the_formula(hosts, tmp_path, rate):
    hosts.limit(rate)
    figures = tmp_path / "figures.json"
    launcher = ["deepspeed", "--log_level", "error", "--hostfile", str(hosts.hostfile(2))]
    bench = ["--no_local_rank", "--module", "infini_ds.cli", "bench", "transport", "--steps", "3"]
    command = [*launcher, *bench, "--dtype", "fp32", "--json", str(figures)]
    with Processes([hosts[0].start(*command, log=tmp_path / "log", cwd=ROOT)]) as processes:
        assert processes.wait(LIMIT) == [0], processes.outputs()
        print(f"{rate}:\n{processes.all[0].output}")
    found = json.loads(figures.read_text())
    assert found["stages"] == 2
    assert found["sent_bytes"] == found["formula_bytes"]
