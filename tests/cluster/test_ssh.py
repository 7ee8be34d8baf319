"""`deepspeed --hostfile HOSTS launch/pretrain.sh CONFIG` on several hosts."""

import json
import signal
import time

import pytest

from infini_ds import config as configuration
from tests.cluster.conftest import FP32, LAYOUTS, LIMIT
from tests.distributed.conftest import SCRIPT, Run
from tests.distributed.processes import Processes

ROOT = SCRIPT.parents[1]
RANK = f"-u {SCRIPT}"
"""What the command line of a rank contains, and of nothing else."""


def launch(hosts, count: int, run: Run, *overrides: str) -> Processes:
    """Types the command on the first host."""
    options = ["--log_level", "warning", "--hostfile", str(hosts.hostfile(count))]
    command = ["deepspeed", *options, str(SCRIPT), str(run.config), *overrides]
    return Processes([hosts[0].start(*command, log=run.folder / "launch.log", cwd=ROOT)])


@pytest.mark.parametrize(
    ("count", "layout"),
    [(2, "pipeline"), (2, "data"), (2, "context"), (3, "pipeline")],
    ids=lambda v: str(v),
)
def test_hosts_train_as_one_process_does(hosts, tmp_path, data, alone, count, layout):
    run = Run(tmp_path, data, **FP32)
    with launch(hosts, count, run, LAYOUTS[layout]) as launcher:
        assert launcher.wait(LIMIT) == [0], launcher.outputs()
    assert run.losses == pytest.approx(alone.losses, rel=1e-5)
    assert not any(host.processes() for host in hosts.all)


PROMPT = """costs $HOME `a` "b" 'c' \\d %h %% ; & * [1] {a,b} ~ é"""
"""What a shell or pdsh would change."""


@pytest.mark.slow
def test_supervisor_hands_on_settings_as_they_were_typed(hosts, tmp_path, data):
    run = Run(tmp_path, data, **FP32)
    prompt = f"evaluation.sample_prompt={json.dumps(PROMPT)}"
    command = ["bash", str(SCRIPT), "--hostfile", str(hosts.hostfile(2)), str(run.config), prompt]
    with Processes([hosts[0].start(*command, log=tmp_path / "log", cwd=ROOT)]) as supervisor:
        assert supervisor.wait(LIMIT) == [0], supervisor.outputs()
    assert configuration.load(run.output / "config.yaml").evaluation.sample_prompt == PROMPT


@pytest.mark.slow
@pytest.mark.parametrize("value", ["costs $HOME", "on %h"])
def test_setting_that_the_launcher_changed_ends_the_run_on_all(hosts, tmp_path, data, value):
    run = Run(tmp_path, data, **FP32)
    with launch(hosts, 2, run, f"evaluation.sample_prompt={value}") as launcher:
        assert launcher.wait(LIMIT) == [2], launcher.outputs()
        assert f"{value}' was typed, but " in launcher.all[0].output
    assert not (run.output / "config.yaml").exists()


HANG_TIMEOUT = 15
"""train.hang_timeout of runs that are going to be disturbed, in seconds."""
SLACK = 45
"""Seconds beyond it in which all have ended: stacks are written, launchers and ssh notice."""
LIMIT_OF_STOP = 30
"""Seconds after which DeepSpeed's launcher kills what it was told to end."""
FOREVER = 10**6
"""Steps."""


class Disturbed:
    """An endless two-stage run on two hosts, past its first steps."""

    def __init__(self, hosts, folder, data):
        self.hosts = hosts.all[:2]
        settings = {"train__hang_timeout": HANG_TIMEOUT, "train__save_every": FOREVER}
        self.run = Run(folder, data, **{**FP32, **settings})
        self.launcher = launch(hosts, 2, self.run, f"train.steps={FOREVER}")
        self.launcher.wait_until(lambda: len(self.run.losses) >= 3, LIMIT, "steps")

    def __enter__(self) -> "Disturbed":
        return self

    def __exit__(self, *_) -> None:
        self.launcher.__exit__()

    def wait_for_end(self, limit: float, *hosts, text: str = RANK) -> None:
        """Waits until no rank, or nothing with a text, is left on some hosts (both)."""
        deadline = time.monotonic() + limit
        while left := [p for host in hosts or self.hosts for p in host.processes(text).values()]:
            assert time.monotonic() < deadline, f"{left}\n{self.launcher.outputs()}"
            time.sleep(0.1)

    def wait_for_launcher(self) -> None:
        """Waits until the command that was typed has failed, and all that it started is gone."""
        (code,) = self.launcher.wait(SLACK)
        assert code != 0, self.launcher.outputs()
        self.wait_for_end(SLACK, text="deepspeed")

    def stacks(self, rank: int) -> str:
        return (self.run.output / "stacks" / f"rank_{rank}.txt").read_text()


def test_host_cut_off_ends_the_run_on_all(hosts, tmp_path, data, trial):
    with trial("host cut off"):
        with Disturbed(hosts, tmp_path, data) as disturbed:
            hosts.cut(hosts[1])
            disturbed.wait_for_end(HANG_TIMEOUT + SLACK)
            disturbed.wait_for_launcher()
            output = disturbed.launcher.all[0].output
        assert "rank 1 on node-2 is lost" in output
        assert "rank 0, or the host where the ranks met" in disturbed.stacks(1)


@pytest.mark.slow
def test_frozen_rank_ends_the_others_and_the_launcher_ends_it(hosts, tmp_path, data, trial):
    with (
        trial("`SIGSTOP` of the rank on another host"),
        Disturbed(hosts, tmp_path, data) as disturbed,
    ):
        hosts[1].send(RANK, signal.SIGSTOP)
        disturbed.wait_for_end(HANG_TIMEOUT + SLACK, hosts[0])
        assert f"train.hang_timeout = {HANG_TIMEOUT} s" in disturbed.stacks(0)
        assert "rank 1 on node-2 is lost" in disturbed.launcher.all[0].output
        # What is frozen cannot end itself, and DeepSpeed's launcher waits for it.
        hosts[0].send("bin/deepspeed", signal.SIGINT)
        disturbed.wait_for_end(LIMIT_OF_STOP + SLACK)
        disturbed.wait_for_launcher()


@pytest.mark.slow
def test_supervisor_starts_a_run_again_whose_rank_was_killed_on_another_host(
    hosts, tmp_path, data, trial
):
    steps, saved = 200, 20
    settings = {"train__steps": steps, "train__save_every": saved, "train__keep_last": 3}
    run = Run(tmp_path, data, **{**FP32, **settings})
    options = ["--max-restarts", "2", "--hostfile", str(hosts.hostfile(2))]
    command = ["bash", str(SCRIPT), *options, str(run.config)]
    with trial("`kill -9` of the rank on another host, started again by the supervisor"):
        with Processes([hosts[0].start(*command, log=tmp_path / "log", cwd=ROOT)]) as supervisor:
            supervisor.wait_until(lambda: len(run.losses) > saved, LIMIT, "a checkpoint")
            hosts[1].send(RANK, signal.SIGKILL)
            assert supervisor.wait(LIMIT) == [0], supervisor.outputs()
            output = supervisor.all[0].output
        assert "rank 1 on node-2 is lost" in output
        assert output.count("; restart 1 of 2 in 5 s") == 1
        assert sorted(run.losses) == list(range(1, steps + 1))
        assert not any(host.processes() for host in hosts.all)


def test_interrupted_launcher_leaves_a_checkpoint_to_go_on_from(hosts, tmp_path, data, trial):
    with trial("`SIGINT` of DeepSpeed's launcher"):
        with Disturbed(hosts, tmp_path, data) as disturbed:
            hosts[0].send("bin/deepspeed", signal.SIGINT)
            disturbed.wait_for_end(LIMIT_OF_STOP)
            disturbed.wait_for_launcher()
        run = disturbed.run
        stopped = max(run.losses)
        assert (run.checkpoint(stopped) / "manifest.json").exists()
        with launch(hosts, 2, run, f"train.steps={stopped + 1}") as launcher:
            assert launcher.wait(LIMIT) == [0], launcher.outputs()
            assert f"at step {stopped}\n" in launcher.all[0].output
        assert max(run.losses) == stopped + 1
