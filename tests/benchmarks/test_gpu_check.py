"""The check of a GPU: its steps with their limits, and each part, tiny and on a CPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from infini_ds.benchmarks.gpu_check import __main__ as program
from infini_ds.benchmarks.gpu_check import compiling, plan, results, runs, steps, tiles
from infini_ds.benchmarks.gpu_check.results import Part
from infini_ds.benchmarks.gpu_check.steps import Command, Steps
from infini_ds.errors import RunError, UserError
from infini_ds.kernels.infini_attention.triton.scan import scan_kernel

ROOT = Path(__file__).parents[2]


def python(code: str, **environment: str) -> Command:
    return Command([sys.executable, "-S", "-c", code], environment)


@pytest.fixture
def check(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "GRACE_SECONDS", 0.5)
    return Steps(tmp_path, 60.0)


@pytest.mark.parametrize(
    ("codes", "code"), [((0,), 0), ((0, 0), 0), ((0, 3), 3), ((4, 0), 4), ((0, -9), 9)], ids=str
)
def test_a_step_fails_with_one_of_its_commands_after_all_have_run(check, tmp_path, codes, code):
    commands = [
        python(
            f"import os, sys; print('ran'); sys.stdout.flush(); "
            f"os.kill(os.getpid(), {-each}) if {each} < 0 else sys.exit({each})"
        )
        for each in codes
    ]
    assert check.run("some", 30, commands) == (code == 0)
    assert check.codes == {"some": code}
    assert (tmp_path / "logs/some.log").read_text() == "ran\n" * len(codes)
    assert f"exit {code:3d}" in (tmp_path / "summary.txt").read_text()


def test_commands_run_at_once_as_many_as_are_asked_for(check, tmp_path):
    def begin_and_end(name: str) -> list[float]:
        return [float(word) for word in (tmp_path / name).read_text().split()]

    def commands(seconds: float) -> list[list[str]]:
        code = "import time; print(time.monotonic()); time.sleep({}); print(time.monotonic())"
        script = f"import sys; sys.stdout = open({{!r}}, 'w'); {code.format(seconds)}"
        return [python(script.format(str(tmp_path / name))) for name in ("one", "other")]

    assert check.run("pair", 30, commands(1), at_once=2)
    (one, ended), (other, other_ended) = map(begin_and_end, ("one", "other"))
    assert max(one, other) < min(ended, other_ended)
    assert check.run("single", 30, commands(0.1))
    assert begin_and_end("one")[1] < begin_and_end("other")[0]


@pytest.mark.parametrize("ignores", [False, True], ids=["asked", "killed"])
def test_a_step_ends_at_its_limit_with_all_that_it_started(check, tmp_path, monkeypatch, ignores):
    monkeypatch.setattr(steps, "LEAST_SECONDS", 0.5)
    child = (
        f"import os, signal, time; open({str(tmp_path / 'pid')!r}, 'a').write(f'{{os.getpid()}} ');"
        f"{'signal.signal(signal.SIGTERM, signal.SIG_IGN);' if ignores else ''} time.sleep(60)"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {child!r}])"
    began = time.monotonic()
    assert not check.run("long", 1.0, [python(parent), python("never")])
    assert check.codes == {"long": 124}
    assert time.monotonic() - began < 1 + 4 * steps.GRACE_SECONDS + 1
    pids = (tmp_path / "pid").read_text().split()
    assert len(pids) == 1
    ends = time.monotonic() + 5
    while runs_still(int(pids[0])):
        assert time.monotonic() < ends
        time.sleep(0.02)


def runs_still(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_without_time_a_step_is_left_out(tmp_path):
    short = Steps(tmp_path, steps.GRACE_SECONDS + steps.LEAST_SECONDS - 1)
    assert not short.run("late", 30, [python("")])
    assert short.codes == {"late": None}
    assert "late: no time left" in (tmp_path / "summary.txt").read_text()


def test_parts_are_told_when_to_begin_nothing_more(check, tmp_path):
    check.run("told", 30, [python("import os; print(os.environ['PART_SECONDS'], os.environ['A'])",
                                  A="own")])  # fmt: skip
    assert (tmp_path / "logs/told.log").read_text() == "30 own\n"  # GRACE_SECONDS is half a second


def test_a_row_that_its_writer_did_not_end_is_left_out(tmp_path):
    part = Part(True, tmp_path / "results.jsonl", time.monotonic())
    part.note("call", ms=1 / 3, way="forward")
    part.note("tile", us=3.0)
    with part.results.open("a") as file:
        file.write('{"part": "cal')
    assert results.rows(part.results)[0] == {"part": "call", "ms": 1 / 3, "way": "forward"}
    assert results.summary(part.results) == ["call: ms 0.3333, way forward"]
    assert part.late()


@pytest.fixture(scope="module")
def part(tmp_path_factory) -> Part:
    folder = tmp_path_factory.mktemp("gpu_check")
    return Part(True, folder / "results.jsonl", time.monotonic() + 1e6)


CANDIDATES = sum(
    len({tiles.chosen(name, 128, 2, 9), *(tiles.Tiles(*each) for each in others)})
    for name, others in tiles.CANDIDATES.items()
)
PARTS = {
    "correct": (["0"], {"correct": 1}),
    "bench": ([], {"rates": 1, "call": 9, "kernels": 6}),
    "sdpa": ([], {"sdpa": 1}),
    "models": ([], {"models": 6}),
    "sweep": ([], {"document": 2, "full": 1}),
    "million": ([], {"full": 1}),
    "tiles": ([], {"tile": 2 * CANDIDATES, "tiles": 2 * len(tiles.CANDIDATES)}),
}


@pytest.mark.parametrize("name", PARTS)
def test_each_part_runs_tiny(part, monkeypatch, name):
    arguments, wanted = PARTS[name]
    before = len(results.rows(part.results))
    monkeypatch.setenv("RESULTS", str(part.results))
    monkeypatch.setenv("DRY", "1")
    monkeypatch.setenv("REPEATS", "2")
    assert program.main([name, *arguments]) == 0
    rows = results.rows(part.results)[before:]
    counts = {kind: sum(row["part"] == kind for row in rows) for kind in wanted}
    assert counts == wanted
    assert len(rows) == sum(wanted.values())
    assert not any("error" in row for row in rows)


@pytest.mark.parametrize("name", ["bench", "sdpa", "sweep", "tiles"])
def test_a_part_that_is_late_begins_nothing(tmp_path, monkeypatch, name):
    monkeypatch.setenv("RESULTS", str(tmp_path / "results.jsonl"))
    monkeypatch.setenv("DRY", "1")
    monkeypatch.setenv("PART_SECONDS", "0")
    assert program.main([name]) == 0
    assert {row["part"] for row in results.rows(tmp_path / "results.jsonl")} <= {"rates"}


def test_wrong_and_moving_results_are_told(part, monkeypatch):
    from infini_ds.benchmarks.gpu_check import correctness
    from infini_ds.kernels.infini_attention.parallel import infini_attention_parallel

    calls = iter(range(100))

    def moves(inputs):
        out, memory = infini_attention_parallel(inputs)
        return out + 2**-12 * next(calls), memory

    def wrong(inputs):
        out, memory = infini_attention_parallel(inputs)
        return out * 1.1, memory

    monkeypatch.setenv("REPEATS", "2")
    for operation, verdict in ((moves, "MOVING"), (wrong, "WRONG")):
        monkeypatch.setattr(correctness, "ours", lambda _, each=operation: each)
        assert not correctness.correct(part, "4")
        row = results.rows(part.results)[-1]
        assert row["verdict"] == verdict
        assert "output" in row["moving" if verdict == "MOVING" else "wrong"]


def test_kernels_are_compiled_ahead_by_the_path_of_the_runs(part, monkeypatch, capsys):
    """Two small ones, for Hopper, though there is no GPU."""
    compiled = []
    run = scan_kernel.run
    monkeypatch.setattr(compiling, "OF_TINY", ("scan_kernel",))
    monkeypatch.setattr(
        scan_kernel, "run",
        lambda **arguments: compiled.append(run(**arguments)),
    )  # fmt: skip
    compiling.compile_ahead(part, "linear:2:32:2:1:64:model")
    assert {kernel.metadata.target.arch for kernel in compiled} == {90}
    assert "linear:2:32:2:1:64:model" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("own", "newer", "chosen"), [(2, 2, True), (1, 2, True), (2, 1, False), (0, 0, False)]
)
def test_what_follows_is_assembled_by_what_is_right(tmp_path, monkeypatch, own, newer, chosen):
    monkeypatch.setenv("TRITON_PTXAS_PATH", "")  # so that what is set goes again
    monkeypatch.delenv("TRITON_PTXAS_PATH")
    (tmp_path / "work").mkdir()
    made = plan.Check(tmp_path / "out", tmp_path / "work", True, "/newer/ptxas")
    part = Part(True, made.steps.results, time.monotonic())

    def run(name, limit, commands, at_once):
        assert [command.environment for command in commands] == (
            [{}] * 2 + [{"TRITON_PTXAS_PATH": "/newer/ptxas"}] * 2
        )
        for ptxas, right in (("", own), ("/newer/ptxas", newer)):
            for case in range(2):
                verdict = "ok" if case < right else "WRONG"
                part.note("correct", verdict=verdict, ptxas=ptxas)

    monkeypatch.setattr(made.steps, "run", run)
    made.plan["correct"]()
    assert (os.environ.get("TRITON_PTXAS_PATH") == "/newer/ptxas") == chosen


def test_what_failed_is_named_and_the_rest_has_run(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    made = plan.Check(tmp_path / "out", tmp_path / "work", True, None)
    ran = []

    def step(name, code):
        def run():
            ran.append(name)
            made.steps.codes[name] = code

        return run

    made.plan = {name: step(name, code) for name, code in (("a", 0), ("b", 2), ("c", None))}
    with pytest.raises(RunError, match="gpu-check: b failed"):
        made.run([])
    assert ran == ["a", "b", "c"]
    made.steps.codes.clear()
    made.run(["c", "a"])
    assert ran[3:] == ["c", "a"]
    with pytest.raises(UserError, match="no step d; there are a, b, c"):
        made.run(["a", "d"])


@pytest.mark.parametrize(
    ("two", "last", "good"),
    [({1: 5.0, 2: 4.0}, 16, True), ({1: 5.2, 2: 4.0}, 16, False), ({1: 5.0}, 16, False),
     ({1: 5.0, 2: 4.0}, 12, False), ({}, 16, False)],
)  # fmt: skip
def test_losses_of_two_stages_are_those_of_one(tmp_path, monkeypatch, two, last, good):
    monkeypatch.setattr(runs, "STEPS_OF_TWO", 2)
    made = runs.Runs(tmp_path, tmp_path, True)
    for name, losses in (("run", {1: 5.0, 2: 4.0, last: 3.0}), ("two_stages", two)):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"step": step, "train/loss": loss}) for step, loss in losses.items()]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 3}']))
    noted = []
    assert made.losses_agree(lambda name, **row: noted.append((name, row))) == good
    assert noted[0][0] == "pipeline"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_all_of_it_runs_dry(tmp_path):
    began = time.monotonic()
    command = ["make", "gpu-check", "VENV=", f"PYTHON={sys.executable}", "DRY=1", f"OUT={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - began < 180
    codes = [line for line in done.stdout.splitlines() if " exit " in line]
    assert codes
    assert all("exit   0" in line for line in codes)
