import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from infini_ds.training.monitor import Monitor, _duration, _roughly
from tests import tiny


def metrics(loss=1.5, skipped=0, rollbacks=0):
    return {
        "train/loss": loss,
        "train/skipped_steps": skipped,
        "train/rollbacks": rollbacks,
        "speed/tokens_per_second": 1234.5,
        "speed/useful_tokens": 0.98,
        "learning_rate/gates": 1e-3,
    }


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def opened(folder, first=0, last=10, **changes):
    return Monitor(tiny.run_config(output_dir=str(folder), train__steps=last, **changes), first)


def run(folder, first, steps, last=10, **changes):
    monitor = opened(folder, first, last)
    for step in steps:
        monitor.step(step, metrics(**changes), log=True)
    monitor.close()


def test_metrics_have_a_line_for_each_step(tmp_path):
    run(tmp_path, 0, [1, 2, 3])
    assert records(tmp_path) == [{"step": step, **metrics()} for step in (1, 2, 3)]


def test_metrics_are_written_at_once(tmp_path):
    monitor = opened(tmp_path)
    monitor.step(1, metrics(), log=True)
    assert len(records(tmp_path)) == 1
    monitor.close()


def test_steps_that_are_not_logged_are_not_written(tmp_path):
    monitor = opened(tmp_path)
    for step in range(1, 7):
        monitor.step(step, metrics(), log=step % 3 == 0)
    monitor.close()
    assert [record["step"] for record in records(tmp_path)] == [3, 6]


def test_resuming_drops_the_steps_after_the_checkpoint(tmp_path):
    run(tmp_path, 0, [1, 2, 3, 4], loss=1.0)
    run(tmp_path, 2, [3, 4, 5], loss=2.0)
    found = [(record["step"], record["train/loss"]) for record in records(tmp_path)]
    assert found == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]


def test_figures_that_cannot_be_written_do_not_end_the_run(tmp_path, capsys):
    monitor = opened(tmp_path)
    monitor._recorders[0]._file.close()
    monitor._recorders[0]._file = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    for step in (1, 2):
        monitor.step(step, metrics(), log=True)
    monitor.close()
    said = capsys.readouterr().out
    assert said.count("warning: JsonLines: figures cannot be recorded (No space left") == 1


def test_evaluation_of_a_step_is_found_by_the_next_process(tmp_path):
    monitor = opened(tmp_path)
    monitor.step(1, metrics(), log=True)
    assert not monitor.has_evaluation(1)
    monitor.record(1, {"memory/norm_of_block_000": 1.0})
    monitor.close()
    again = opened(tmp_path, 1)
    assert again.has_evaluation(1)
    assert not again.has_evaluation(0)
    again.close()


def test_resuming_drops_a_line_that_was_cut_off(tmp_path):
    run(tmp_path, 0, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "train/lo')
    run(tmp_path, 2, [3])
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3]


def test_going_back_drops_the_steps_after_the_checkpoint(tmp_path):
    monitor = opened(tmp_path)
    for step in (1, 2, 3):
        monitor.step(step, metrics(), log=True)
    monitor.go_back_to(1)
    monitor.step(2, metrics(loss=2.0), log=True)
    monitor.close()
    found = [(record["step"], record["train/loss"]) for record in records(tmp_path)]
    assert found == [(1, 1.5), (2, 2.0)]


@pytest.fixture
def board(tmp_path):
    monitor = opened(tmp_path, seed=17)
    monitor.step(1, metrics(), log=True)
    monitor.record(1, {"held_out/bits_per_byte": 2.5, "memory/norm_of_block_000": 0.5})
    monitor.gates(1, np.array([[0.1, 0.9], [0.5, 0.5]]))
    monitor.text(1, "sample", "def f():\n    return 1")
    monitor.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "training"))
    events.Reload()
    return events


def test_board_has_every_number(board):
    expected = {**metrics(), "held_out/bits_per_byte": 2.5, "memory/norm_of_block_000": 0.5}
    assert set(board.Tags()["scalars"]) == set(expected)
    for name, value in expected.items():
        (event,) = board.Scalars(name)
        assert (event.step, event.value) == (1, pytest.approx(value))


def test_board_has_the_gates_as_histogram_and_image(board):
    assert board.Tags()["histograms"] == ["memory/gate"]
    (image,) = board.Images("memory/gate_by_layer_and_head")
    assert image.width > 100, "with axes and a scale"
    assert image.height > 100


def test_board_has_the_sample_and_the_config(board):
    (sample,) = board.Tensors("sample/text_summary")
    assert "def f():\n    return 1" in sample.tensor_proto.string_val[0].decode()
    (config,) = board.Tensors("config/text_summary")
    assert "seed: 17" in config.tensor_proto.string_val[0].decode()


def overview(folder) -> list[str]:
    """Patterns of TensorBoard's page of what people look at first."""
    events = EventAccumulator(str(folder / "tensorboard" / "training")).Reload()
    (layout,) = events.Tensors("custom_scalars__config__")
    charts = Layout.FromString(layout.tensor_proto.string_val[0]).category[0].chart
    return [pattern for chart in charts for pattern in chart.multiline.tag]


def test_board_has_a_page_of_what_people_look_at_first(tmp_path):
    opened(tmp_path, model__memory={"write_gate": True}).close()
    patterns = overview(tmp_path)
    shown = {
        "held_out/bits_per_byte", "held_out_without_memory/bits_per_byte", "train/loss",
        "held_out_unigram/bits_per_byte", "memory/write_mass/layer_0", "seconds/pipeline",
    }  # fmt: skip
    for name in shown:
        assert sum(bool(re.fullmatch(pattern, name)) for pattern in patterns) == 1
    assert not any(re.fullmatch(pattern, "seconds/saving") for pattern in patterns)


def test_board_has_no_empty_charts_of_what_a_run_does_not_have(tmp_path):
    opened(tmp_path).close()
    assert overview(tmp_path) == [
        "train/loss", "held_out(_without_memory|_unigram)?/bits_per_byte",
        "speed/tokens_per_second", "seconds/(?!saving).*", "memory/norm_of_block_.*",
    ]  # fmt: skip


def test_drawing_of_many_gates_is_small_enough_for_its_letters(tmp_path):
    monitor = opened(tmp_path)
    monitor.gates(1, np.full((80, 64), 0.1))
    monitor.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "training")).Reload()
    (image,) = events.Images("memory/gate_by_layer_and_head")
    assert 400 <= image.width <= 600
    assert 400 <= image.height <= 700


def test_board_of_an_earlier_version_goes_on_where_it_is(tmp_path):
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events.out.tfevents.1").touch()
    run(tmp_path, 0, [1])
    assert not (tmp_path / "tensorboard" / "training").exists()
    assert len(list((tmp_path / "tensorboard").glob("events.*"))) == 2


def test_board_forgets_the_steps_after_the_checkpoint(tmp_path):
    run(tmp_path, 0, [1, 2, 3, 4], loss=1.0)
    run(tmp_path, 2, [3, 4], loss=2.0)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "training"), purge_orphaned_data=True)
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


def test_end_says_how_long_the_steps_of_this_process_took(tmp_path, capsys, clock):
    monitor = opened(tmp_path, 2)
    for step in (3, 4):
        monitor.step(step, metrics(), log=True)
    clock.now = 185.0
    monitor.close()
    assert capsys.readouterr().out.splitlines()[-1] == "2 steps in 3:05"


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr("infini_ds.training.monitor.time", clock)
    return clock


@pytest.mark.parametrize(
    ("first", "last", "seconds_each", "told_after", "text"),
    [
        (0, 400, 1.0, 6, "about 7 minutes on this machine for the 394 steps left"),
        (300, 400, 1.0, 6, "about 2 minutes on this machine for the 94 steps left"),
        (0, 1000, 3600.0, 4, "about 42 days on this machine for the 996 steps left"),
        (0, 300, 0.01, None, None),
        (0, 6, 1.0, None, None),
        (0, 7, 1.0, 6, "about 10 seconds on this machine for the 1 steps left"),
    ],
    ids=["whole run", "resumed", "long steps", "all done in seconds", "at its end", "nearly"],
)
def test_how_long_it_takes_is_told_once_by_steps_after_the_first(
    first, last, seconds_each, told_after, text, tmp_path, capsys, clock
):
    monitor = opened(tmp_path, first, last)
    clock.now += 60.0  # the first step of a process is slow
    told = []
    for step in range(first + 1, last + 1):
        monitor.step(step, metrics(), log=False)
        lines = capsys.readouterr().out.splitlines()
        told += [(step, line) for line in lines if line.startswith("about")]
        clock.now += seconds_each
    monitor.close()
    assert told == ([(first + told_after, text)] if text else [])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "10 seconds"), (11, "20 seconds"), (44, "50 seconds"), (46, "a minute"),
        (89, "a minute"), (91, "2 minutes"), (290, "5 minutes"), (5399, "90 minutes"),
        (5401, "2 hours"), (100_000, "28 hours"), (130_000, "2 days"),
    ],
)  # fmt: skip
def test_rough_duration_is_written_as(seconds, text):
    assert _roughly(seconds) == text


def test_time_left_is_that_of_the_steps_after_going_back(tmp_path, capsys, clock):
    monitor = opened(tmp_path, last=100)
    for step in (1, 2, 3):
        clock.now += 100.0
        monitor.step(step, metrics(), log=False)
    monitor.go_back_to(1)
    clock.now += 10.0
    monitor.step(2, metrics(), log=False)
    monitor.close()
    assert "step 2/100" in capsys.readouterr().out
    assert monitor._seconds_left(2, clock.now) == 980.0


def test_line_shows_step_loss_speed_and_skipped_steps(tmp_path, capsys):
    run(tmp_path, 0, [10], skipped=3, rollbacks=2)
    line = capsys.readouterr().out
    parts = ["step 10/10", "loss 1.5000", "1,234 tokens/s", "98% useful", "left", "3 steps skipped"]
    for part in (*parts, "2 rollbacks"):
        assert part in line


def test_line_says_nothing_of_skipped_steps_when_there_are_none(tmp_path, capsys):
    run(tmp_path, 0, [10])
    line = capsys.readouterr().out
    assert "skipped" not in line
    assert "rollbacks" not in line


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (61, "1:01"), (3599.6, "1:00:00"), (7384, "2:03:04")]
)
def test_duration_is_written_as(seconds, text):
    assert _duration(seconds) == text


SHOWING = """
import sys
from tests.training.test_monitor import opened
monitor = opened(sys.argv[1])
monitor.say("the first line [red]")
sys.stdin.read(1)
for _ in range(3):
    monitor.say("a line that nobody reads")
monitor.close()
"""


@pytest.mark.parametrize("output", ["closed", "full"])
def test_a_run_goes_on_where_nothing_can_be_shown(tmp_path, output):
    shown = open("/dev/full", "w") if output == "full" else subprocess.PIPE  # noqa: SIM115
    command = [sys.executable, "-c", SHOWING, str(tmp_path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=shown, text=True)
    if process.stdout:
        assert process.stdout.readline() == "the first line [red]\n"
        process.stdout.close()
    process.communicate("x", timeout=60)
    assert process.returncode == 0
    assert (tmp_path / "metrics.jsonl").exists()


def test_run_goes_on_when_its_terminal_is_closed(tmp_path, monkeypatch):
    ours, its = os.openpty()
    monkeypatch.setenv("TERM", "xterm")
    with open(its, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        monitor = opened(tmp_path)
        assert monitor._live
        monitor.step(1, metrics(), log=True)
        os.close(ours)
        monitor.step(2, metrics(), log=True)
        monitor.say("a line")
        monitor.close()
    assert [record["step"] for record in records(tmp_path)] == [1, 2]
