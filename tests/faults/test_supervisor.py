"""The supervisor around a launcher that only pretends to train."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from infini_ds.cluster import supervisor
from infini_ds.runs import failures
from tests import tiny
from tests.distributed.conftest import SCRIPT
from tests.distributed.processes import Process, Processes

WORKER = Path(__file__).with_name("supervise_worker.py")
LIMIT = 180
"""Seconds that anything may take, on a machine with other work."""


class Supervised:
    def __init__(self, folder: Path, restarts: int, scenario: list[dict]):
        self.output = folder / "output"
        arguments = [str(self.output), str(restarts), json.dumps(scenario)]
        command = [sys.executable, str(WORKER), *arguments]
        self.processes = Processes([Process(command, folder / "log", {}, None)])

    def ended(self) -> tuple[int, list[str]]:
        """Exit code and lines of output."""
        with self.processes as processes:
            (code,) = processes.wait(LIMIT)
            return code, processes.all[0].output.splitlines()

    @property
    def starts(self) -> list[int]:
        return [int(pid) for pid in (self.output / "starts").read_text().split()]


@pytest.mark.parametrize(
    ("scenario", "code", "starts", "last"),
    [
        pytest.param([{"code": 0}], 0, 1, None, id="success"),
        pytest.param(
            [{"code": 1, "step": 3}, {"code": 7, "step": 5}, {"code": 0}], 0, 3,
            "exit code 7; restart 2 of 2 in 0.1 s", id="two_failures",
        ),
        pytest.param(
            [{"code": 2, "step": 3}], 2, 1, "as this is a mistake in the command", id="mistake"
        ),
        pytest.param([{"code": 1}], 1, 1, "as it made no step", id="failure_at_the_start"),
        pytest.param(
            [{"code": 1, "step": 3}, {"code": 1}], 1, 2, "as it made no step",
            id="failure_at_the_second_start",
        ),
        pytest.param(
            [{"code": 1, "step": step} for step in (1, 2, 3)], 1, 3, "after 2 restarts",
            id="too_many",
        ),
    ],
)  # fmt: skip
def test_starts_again_where_it_helps(tmp_path, scenario, code, starts, last):
    job = Supervised(tmp_path, 2, scenario)
    ended, lines = job.ended()
    assert (ended, len(job.starts)) == (code, starts), lines
    if last is None:
        assert lines == []
    else:
        assert last in lines[-1]
        assert len(lines) == starts - (code == 0)


def test_says_what_the_rank_put_on_record(tmp_path):
    job = Supervised(tmp_path, 0, [{"forever": True}])
    with job.processes as processes:
        processes.wait_until((job.output / "ready").exists, LIMIT, "the launcher")
        failures.record(job.output, 7, "the disk is full")
        os.kill(job.starts[0], signal.SIGKILL)
        assert processes.wait(LIMIT) == [128 + signal.SIGKILL]
        assert "exit code 137 (rank 0: the disk is full)" in processes.all[0].output


def test_launcher_that_does_not_end_after_a_failure_is_told_to(tmp_path):
    job = Supervised(tmp_path, 0, [{"forever": True}])
    with job.processes as processes:
        processes.wait_until((job.output / "ready").exists, LIMIT, "the launcher")
        failures.record(job.output, 7, "rank 1 on node-2 is lost")
        assert processes.wait(LIMIT) == [128 + signal.SIGINT]
        output = processes.all[0].output
    assert "the run failed, but has not ended after 1 s: told to end" in output
    assert "exit code 130 (rank 0: rank 1 on node-2 is lost)" in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_stops_the_run_for_good(tmp_path, number):
    job = Supervised(tmp_path, 9, [{"forever": True, "step": 3}])
    with job.processes as processes:
        processes.wait_until((job.output / "ready").exists, LIMIT, "the launcher")
        processes.all[0].send(number)
        assert processes.wait(LIMIT) == [0]
        (line,) = processes.all[0].output.splitlines()
    assert "asked to stop: the run finishes its step, saves and ends" in line
    assert len(job.starts) == 1


def test_shell_that_repeats_the_hangup_does_not_kill_the_run(tmp_path):
    job = Supervised(tmp_path, 9, [{"forever": True, "slow": 0.5, "step": 3}])
    with job.processes as processes:
        processes.wait_until((job.output / "ready").exists, LIMIT, "the launcher")
        for _ in range(3):
            processes.all[0].send(signal.SIGHUP)
        assert processes.wait(LIMIT) == [0]


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        (137, "`dmesg`"), (247, "`dmesg`"), (135, "--shm-size"), (249, "--shm-size"), (0, ""),
        (1, ""), (2, ""), (130, ""), (143, ""), (241, ""), (255, ""),
    ],
)  # fmt: skip
def test_rank_that_the_system_has_killed_is_told_as_such(code, hint):
    assert hint in supervisor._killed(code)
    assert bool(hint) == bool(supervisor._killed(code))


def test_leaves_no_process_behind(tmp_path):
    job = Supervised(tmp_path, 0, [{"code": 1, "orphan": True}])
    code, lines = job.ended()
    assert code == 1
    assert "processes are left 1 s after the launcher's end: killed" in lines[0]
    pid = int((job.output / "orphan").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def script(tmp_path):
    """Runs launch/pretrain.sh with bash and a `deepspeed` that shows how it was called."""
    config = tiny.write_run(tmp_path / "run.yaml", output_dir=str(tmp_path / "output"))
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "deepspeed").write_text('#!/bin/sh\necho "deepspeed $@"\n')
    (programs / "deepspeed").chmod(0o755)

    def run(*options: str) -> tuple[int, list[str]]:
        path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        command = ["bash", str(SCRIPT), *options, str(config), "train.steps=3"]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path}
        )
        return done.returncode, (done.stdout + done.stderr).splitlines()

    run.config = config
    return run


@pytest.mark.parametrize(
    ("options", "passed"),
    [
        ([], []),
        (["--max-restarts", "2"], []),
        (["--max-restarts=2", "--deepspeed", "--num_nodes 1"], ["--num_nodes", "1"]),
    ],
)
def test_script_calls_the_launcher(script, options, passed):
    words = ["deepspeed", "--log_level", "error", *passed, str(SCRIPT), str(script.config)]
    assert script(*options) == (0, [" ".join([*words, "train.steps=3"])])


@pytest.mark.parametrize("content", [None, "", "# no host\n"])
def test_hostfile_that_names_no_host_is_a_mistake(script, tmp_path, content):
    hostfile = tmp_path / "hosts"
    if content is not None:
        hostfile.write_text(content)
    code, lines = script("--hostfile", str(hostfile))
    assert code == 2
    (line,) = lines
    assert f"hostfile {hostfile}" in line


def test_negative_number_of_restarts_is_a_mistake(script):
    code, lines = script("--max-restarts", "-1")
    assert (code, lines) == (2, ["infini-ds: --max-restarts (-1) must be at least 0"])
