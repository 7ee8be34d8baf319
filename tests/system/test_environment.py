"""Whatever others have set, a command works or names the variable in one line, with code 2."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from infini_ds import cli
from infini_ds.guard.signals import StopRequest
from infini_ds.system import environment, exit_code
from tests import tiny

COMMAND = Path(sys.executable).with_name("infini-ds")
MEETING = {
    "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "29500"
}  # fmt: skip
VARIABLES = (*MEETING, "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_STEP_NUM_TASKS", "PMI_SIZE")


@pytest.fixture
def config(tmp_path, monkeypatch) -> Path:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that what is set or removed in a test goes after it
        monkeypatch.delenv(name)
    return tiny.write_run(
        tmp_path / "run.yaml", output_dir="runs/é", data={"store": str(tmp_path / "none")},
        train={"batch_size": 2, "window_segments": 2},
    )  # fmt: skip


@pytest.mark.parametrize(
    "left_over",
    [
        {"WORLD_SIZE": "8"}, {"RANK": "3"}, {"RANK": "x"}, {"LOCAL_RANK": "7"},
        {"WORLD_SIZE": ""}, {"WORLD_SIZE": "0", "RANK": "0"}, {"LOCAL_WORLD_SIZE": "0"},
        {"MASTER_ADDR": "node-1", "MASTER_PORT": "no"}, {"RANK": "1", **MEETING, "LOCAL_RANK": "1"},
        {"SLURM_PROCID": "1", "SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "2"},
        {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}, {"PMI_RANK": "1"},
        {"OMP_NUM_THREADS": "0"}, {"OMP_NUM_THREADS": "4,2"}, {"KMP_AFFINITY": "none"},
    ],
    ids=lambda variables: " ".join(f"{name}={value}" for name, value in variables.items()),
)  # fmt: skip
def test_command_that_is_one_process_does_not_mind(config, monkeypatch, capsys, left_over):
    monkeypatch.setattr(exit_code, "_HEAD_START_SECONDS", 60.0)  # not so long
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["config", str(config)]) == 0
    capsys.readouterr()
    assert cli.main(["config", str(config), "train.stepz=1"]) == 2
    assert capsys.readouterr().err.startswith("infini-ds: config ")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE=8: needs LOCAL_RANK, MASTER_ADDR, MASTER_PORT, RANK as"),
        ({"RANK": "3"}, "WORLD_SIZE=1: must be above RANK (3)"),
        ({"RANK": "0", "LOCAL_RANK": "5"}, "WORLD_SIZE=1: must be above LOCAL_RANK (5)"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK='-1': must be a number"),
        ({"LOCAL_SIZE": "two"}, "LOCAL_SIZE='two': must be a number"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE='2.0': must be a number"),
        ({**MEETING, "MASTER_PORT": "70000"}, "MASTER_PORT=70000: must be the same port"),
        ({**MEETING, "MASTER_PORT": "0"}, "MASTER_PORT=0: must be the same port"),
        ({**MEETING, "MASTER_PORT": "tcp://h:1"}, "MASTER_PORT='tcp://h:1': must be a number"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS=2: srun has started this 2 times"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=4: mpirun has started this 4 times"),
        ({"PMI_SIZE": "3"}, "PMI_SIZE=3: mpiexec has started this 3 times"),
        ({"DS_ACCELERATOR": "gpu"}, "DS_ACCELERATOR='gpu': must be cpu or cuda"),
        ({"DS_ACCELERATOR": ""}, "DS_ACCELERATOR='': must be cpu or cuda"),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_variable_that_a_run_cannot_go_by_is_named(config, monkeypatch, capsys, variables, message):
    monkeypatch.setattr(exit_code, "_HEAD_START_SECONDS", 0.0)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["pretrain", str(config)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"environment variable {message}" in line


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_NTASKS": "16"}, {"PMI_SIZE": "1"},
        {**MEETING, "SLURM_STEP_NUM_TASKS": "2"}, {"SLURM_STEP_NUM_TASKS": "unknown"},
    ],
    ids=["interactive_step", "allocation", "one_process", "told_by_the_batch_script", "unknown"],
)  # fmt: skip
def test_run_is_not_mistaken_for_one_that_was_started_several_times(config, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert environment.world_size() == int(variables.get("WORLD_SIZE", "1"))


@pytest.mark.parametrize(
    "variables",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0"},
        {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "en_US.ISO-8859-1", "PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "ascii:strict", "HOME": "/proc/1", "TERM": "dumb", "COLUMNS": "1"},
    ],
    ids=lambda variables: " ".join(f"{name}={value}" for name, value in variables.items()),
)
def test_no_character_ends_a_command(config, variables):
    config = config.rename(config.with_name("é ☃.yaml"))
    done = subprocess.run(
        [str(COMMAND), "config", str(config), "evaluation.sample_prompt=☃"],
        capture_output=True, check=False, env={**os.environ, **variables},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    encoding = variables.get("PYTHONIOENCODING", "utf-8").partition(":")[0]
    assert "runs/é".encode(encoding, "backslashreplace") in done.stdout


def test_closed_streams_are_not_taken_for_the_next_files(tmp_path):
    code = (
        "import os, sys; from infini_ds.cli import main; code = main(['config']);"
        "file = open(sys.argv[1], 'w'); print('lost'); print('lost', file=sys.stderr);"
        "file.write(f'{code} {file.fileno() > 2} {sys.stdin.read()!r}')"
    )
    path = tmp_path / "file"
    command = 'exec "$0" -c "$1" "$2" <&- >&- 2>&-'
    subprocess.run(["bash", "-c", command, sys.executable, code, str(path)], check=True)
    assert path.read_text() == "0 True ''"


def test_file_limit_is_raised_to_what_is_allowed():
    code = (
        "import resource; from infini_ds.system.environment import raise_file_limit;"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (20, 300)); raise_file_limit();"
        "print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "300 300\n"


@pytest.mark.parametrize("ignored", [False, True], ids=["terminal", "nohup"])
def test_closed_terminal_asks_to_stop_unless_that_is_ignored(ignored):
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        request = StopRequest()
        os.kill(os.getpid(), signal.SIGHUP)
        assert request.requested is not ignored
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
