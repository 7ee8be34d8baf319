"""What the files of a run say of it, while it runs, after its end, and after accidents."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infini_ds import cli
from infini_ds import config as configuration
from infini_ds.cluster.status import figures_of
from infini_ds.cluster.tail import lines_backwards
from infini_ds.planning.estimate import checkpoint_bytes
from infini_ds.runs import failures, manifest
from tests.distributed.conftest import Run, data  # noqa: F401
from tests.tiny_run import tiny_config

STEPS = 1000


class Directory:
    """The files of a run that no training made, last written `age` seconds ago."""

    def __init__(self, path: Path):
        self.path = path
        config = tiny_config(path)
        train = config.train.model_copy(update={"steps": STEPS})
        text = configuration.dump(config.model_copy(update={"train": train}))
        (path / "config.yaml").write_text(text)
        self.metrics = path / "metrics.jsonl"
        self.metrics.touch()

    def add_steps(self, first: int, last: int, seconds: float = 2.0) -> None:
        with self.metrics.open("a") as file:
            for step in range(first, last + 1):
                line = {
                    "step": step, "train/loss": 9 - step / 1000, "train/tokens": 64 * step,
                    "train/skipped_steps": 3, "speed/tokens_per_second": 32.0,
                    "seconds/step": seconds,
                }  # fmt: skip
                print(json.dumps(line), file=file)

    def add_evaluation(self, step: int, bits: float) -> None:
        with self.metrics.open("a") as file:
            print(json.dumps({"step": step, "held_out/bits_per_byte": bits}), file=file)

    def add_checkpoint(self, step: int, finished: bool = True) -> Path:
        path = self.path / "checkpoints" / f"step_{step:08d}"
        path.mkdir(parents=True)
        (path / "weights").write_bytes(b"1234")
        if finished:
            manifest.write(path, {"weights": {"size": 4, "sha256": "not compared"}})
        return path

    def finish(self, step: int) -> None:
        (self.path / "report.json").write_text(json.dumps({"step": step}))

    def leave(self, seconds: float) -> None:
        """Nothing is written for so long."""
        then = time.time() - seconds
        for path in (*self.path.rglob("*"), self.path):
            os.utime(path, (then, then))


@pytest.fixture
def directory(tmp_path) -> Directory:
    return Directory(tmp_path)


def test_running(directory):
    directory.add_steps(1, 30, seconds=100.0)
    directory.add_evaluation(30, 2.5)
    directory.add_checkpoint(20)
    directory.add_steps(31, 60, seconds=2.0)
    directory.leave(70)
    figures = figures_of(directory.path)
    checkpoint = figures.pop("checkpoint")
    assert figures.pop("age") == pytest.approx(70, abs=30)
    assert figures == {
        "run": str(directory.path), "state": "running", "step": 60, "steps": STEPS,
        "loss": pytest.approx(8.94), "held_out_bits_per_byte": 2.5, "held_out_step": 30,
        "tokens_per_second": 32.0, "tokens": 3840, "seconds_left": 1880.0, "skipped_steps": 3,
        "last_error": None,
    }  # fmt: skip
    assert checkpoint["step"] == 20
    assert checkpoint["path"].endswith("step_00000020")
    assert checkpoint["age"] == pytest.approx(70, abs=30)


def test_run_that_has_only_begun(directory):
    figures = figures_of(directory.path)
    assert (figures["state"], figures["step"]) == ("running", 0)
    for name in ("loss", "held_out_bits_per_byte", "seconds_left", "checkpoint", "tokens"):
        assert figures[name] is None


def test_finished_however_long_ago(directory):
    directory.add_steps(STEPS - 3, STEPS)
    directory.finish(STEPS)
    directory.leave(10**6)
    assert figures_of(directory.path)["state"] == "finished"


def test_run_that_goes_on_beyond_its_report_is_not_finished(directory):
    directory.add_steps(STEPS // 2 - 3, STEPS // 2 + 3)
    directory.finish(STEPS // 2)
    assert figures_of(directory.path)["state"] == "running"


def test_stopped_with_a_checkpoint_of_its_last_step(directory):
    directory.add_steps(1, 7)
    directory.add_checkpoint(7)
    directory.leave(10**6)
    assert figures_of(directory.path)["state"] == "stopped"


@pytest.mark.parametrize("saved", [None, 5])
def test_perhaps_dead_when_nothing_was_written_for_many_steps(directory, saved):
    directory.add_steps(1, 7)
    if saved:
        directory.add_checkpoint(saved)
    directory.leave(300)
    assert figures_of(directory.path)["state"] == "perhaps dead"
    directory.add_steps(8, 30, seconds=100.0)
    directory.leave(300)
    assert figures_of(directory.path)["state"] == "running"


def test_checkpoint_that_is_being_written_is_a_sign_of_life(directory):
    directory.add_steps(1, 7)
    directory.leave(300)
    directory.add_checkpoint(7, finished=False)
    assert figures_of(directory.path)["state"] == "running"


def test_half_a_last_line_is_left_out(directory):
    directory.add_steps(1, 7)
    with directory.metrics.open("a") as file:
        file.write('{"step": 8, "train/loss": 3.1')
    assert figures_of(directory.path)["step"] == 7


def test_half_an_evaluation_is_left_out(directory):
    directory.add_steps(1, 7)
    directory.add_evaluation(7, 2.5)
    with directory.metrics.open("a") as file:
        file.write('{"step": 8, "held_out/bits_per_byte": 1.')
    assert figures_of(directory.path)["held_out_step"] == 7


def test_checkpoint_without_manifest_or_of_another_size_is_not_valid(directory):
    directory.add_steps(1, 7)
    directory.add_checkpoint(4)
    (directory.add_checkpoint(5) / "weights").write_bytes(b"12345")
    directory.add_checkpoint(6, finished=False)
    assert figures_of(directory.path)["checkpoint"]["step"] == 4


def test_error_that_came_after_the_last_line_is_the_end(directory, capsys):
    directory.add_steps(1, 7)
    directory.leave(5)
    failures.record(directory.path, 7, "no space left on device")
    (directory.path / "stacks").mkdir()
    figures = figures_of(directory.path)
    assert figures["state"] == "failed"
    assert figures["last_error"]["message"] == "no space left on device"
    assert cli.main(["status", str(directory.path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "step 7: no space left on device" in shown


def test_error_of_an_earlier_start_is_told_of_a_run_that_goes_on(directory):
    failures.record(directory.path, 7, "no space left on device")
    directory.leave(100)
    directory.add_steps(1, 7)
    figures = figures_of(directory.path)
    assert figures["state"] == "running"
    assert figures["last_error"]["step"] == 7


def test_error_of_an_earlier_start_is_no_end_where_this_hosts_clock_is_behind(directory):
    failures.record(directory.path, 7, "no space left on device")
    directory.leave(-100)
    directory.add_steps(1, 7)
    then = time.time() + 200
    os.utime(directory.metrics, (then, then))
    assert figures_of(directory.path)["state"] == "running"


def test_only_the_end_of_a_large_file_is_read(directory):
    with directory.metrics.open("wb") as file:
        file.seek(8 << 30)  # a hole, which takes no room
        file.write(b"\n")
    directory.add_evaluation(1, 2.5)
    directory.add_steps(1, 30)
    assert figures_of(directory.path)["step"] == 30


def test_lines_come_backwards_from_no_more_than_is_asked_for(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b"one\ntwo\nthree\nfo")
    assert list(lines_backwards(path, 100)) == [b"fo", b"three", b"two", b"one"]
    assert list(lines_backwards(path, 10)) == [b"fo", b"three"]
    path.write_bytes(b"")
    assert list(lines_backwards(path, 10)) == [b""]


def test_lines_across_blocks_are_whole(directory):
    with directory.metrics.open("a") as file:
        print(json.dumps({"step": 1, "held_out/bits_per_byte": 3.5}), file=file)
        for step in range(2, 4000):
            print(json.dumps({"step": step, "speed/filler": "x" * 1009}), file=file)
    directory.add_steps(4000, 4000)
    figures = figures_of(directory.path)
    assert (figures["step"], figures["held_out_bits_per_byte"]) == (4000, 3.5)


def test_table_and_json_have_the_same_figures(directory, capsys, tmp_path):
    directory.add_steps(1, 7)
    directory.add_evaluation(7, 2.5)
    directory.add_checkpoint(5)
    told = tmp_path / "told.json"
    assert cli.main(["status", str(directory.path), "--json", str(told)]) == 0
    figures = json.loads(told.read_text())
    assert figures["state"] == "running"
    shown = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert {
        "step 7 of 1,000", "loss 8.9930", "held-out bits per byte 2.5000 at step 7", "tokens/s 32",
        "tokens 448", "time left 0:33:06", "skipped steps 3",
    } <= shown  # fmt: skip


def test_damaged_lines_are_left_out(directory):
    directory.add_steps(1, 7)
    with directory.metrics.open("ab") as file:
        file.write(b'{"step": 8, "train/loss": null}\n["train/loss"]\n{"train/loss": 1}\n\xff\n')
    failures.record(directory.path, 7, "no space left on device")
    with (directory.path / failures.NAME).open("ab") as file:
        file.write(b'\xff"message"\n3\n{"message": "half of it"}\n')
    figures = figures_of(directory.path)
    assert (figures["step"], figures["loss"], figures["tokens_per_second"]) == (8, None, 32)
    assert figures["last_error"]["message"] == "no space left on device"


@pytest.mark.parametrize("text", ["null", "[1]", "{}", "\xff"])
def test_damaged_report_is_no_end(directory, text):
    directory.add_steps(STEPS, STEPS)
    (directory.path / "report.json").write_text(text, encoding="latin-1")
    assert figures_of(directory.path)["state"] == "running"


def test_checkpoints_that_cannot_be_read_are_not_taken_for_none(directory, capsys):
    directory.add_steps(1, 7)
    path = directory.path / "checkpoints"
    path.touch()
    assert cli.main(["status", str(directory.path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"infini-ds: status {path}: cannot be read (Not a directory)"


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.jsonl", None])
def test_directory_that_is_no_run_is_one_line_with_code_2(directory, capsys, missing):
    path = directory.path / missing if missing else directory.path / "none"
    path.unlink(missing_ok=True)
    run = directory.path if missing else path
    assert cli.main(["status", str(run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"infini-ds: status {run}: is no run; name the output_dir of a run"


def test_run_that_failed_before_it_began_says_why(tmp_path, capsys):
    failures.record(tmp_path, 0, "the 2 processes did not find each other")
    assert cli.main(["status", str(tmp_path)]) == 2
    assert "did not start: the 2 processes did not find each other" in capsys.readouterr().err


def test_it_ends_quietly_where_nobody_reads_it(directory):
    directory.add_steps(1, 7)
    code = (
        "import sys; from infini_ds.cli import main; "
        f"sys.exit(main(['status', {str(directory.path)!r}]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout
    process.stdout.close()
    assert process.communicate()[1] == b""
    assert process.returncode == 141


def test_long_error_is_told_whole(directory, capsys):
    directory.add_steps(1, 7)
    message = "x" * 200 + " and more"
    failures.record(directory.path, 0, message)
    assert cli.main(["status", str(directory.path)]) == 0
    assert message.replace(" ", "") in "".join(capsys.readouterr().out.split())


def test_it_needs_neither_torch_nor_deepspeed(directory):
    directory.add_steps(1, 7)
    code = (
        f"import sys; from infini_ds.cli import main; main(['status', {str(directory.path)!r}]); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'deepspeed')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_real_run_from_its_own_files(tmp_path, data):  # noqa: F811
    run = Run(tmp_path, data, train__steps=6, train__save_every=4, train__dtype="fp32")
    run.finish(1)
    figures = figures_of(run.output)
    assert figures["state"] == "finished"
    assert (figures["step"], figures["held_out_step"], figures["checkpoint"]["step"]) == (6, 6, 6)
    assert figures["loss"] == run.losses[6]
    assert figures["tokens"] == run.metrics[6]["train/tokens"]
    # What a checkpoint is estimated to take is nearly what it takes.
    needed = checkpoint_bytes(configuration.load(run.output / "config.yaml"))
    files = [path for path in run.checkpoint(6).rglob("*") if path.is_file()]
    taken = sum(path.stat().st_size for path in files)
    assert needed == pytest.approx(taken, rel=0.2)
