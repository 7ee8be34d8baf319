"""Whole runs in which ranks share windows, through launch/pretrain.sh."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file

from infini_ds.memory import RULES
from tests.distributed.conftest import Run, copied, without_checkpoints_after
from tests.distributed.test_runs import END, START, error_lines

STEPS, SAVED = 9, 4
SHARED = "parallel.context_parallel=2"
SETTINGS = {
    "train__steps": STEPS, "train__save_every": SAVED, "train__window_segments": 4,
    "evaluation__every": 3, "evaluation__sample_tokens": 12,
}  # fmt: skip
FP32 = {
    **SETTINGS, "train__dtype": "fp32", "optimizer__eps": 1e-5, "optimizer__learning_rate": 1e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def shared(tmp_path_factory, data) -> Run:
    """Two ranks that share all windows, in bf16."""
    run = Run(tmp_path_factory.mktemp("shared"), data, **SETTINGS)
    output = run.finish(2, SHARED)
    assert (
        "layout: 1 pipeline stages x 2 data-parallel (2 ranks to a window), 2 micro-batches"
        in output
    )
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    """Finished fp32 runs, by the number of ranks that share windows and the rule."""
    runs: dict[tuple[int, str], Run] = {}

    def of(context: int, rule: str = "delta") -> Run:
        if (context, rule) not in runs:
            run = Run(tmp_path_factory.mktemp("finished"), data, **FP32, model__memory_rule=rule)
            run.finish(context, f"parallel.context_parallel={context}")
            runs[context, rule] = run
        return runs[context, rule]

    return of


def test_run_stopped_and_gone_on_with_equals_the_undisturbed_one(tmp_path, data, shared):
    run = Run(tmp_path, data, **SETTINGS)
    with run.start(2, SHARED) as ranks:
        ranks.wait_until(lambda: len(run.losses) >= 3, START, "step 3")
        ranks.all[1].send(signal.SIGTERM)
        assert ranks.wait(END) == [0, 0], ranks.outputs()
    stopped = max(run.losses)
    assert stopped < STEPS
    assert f"at step {stopped}\n" in run.finish(2, SHARED)
    assert run.losses == shared.losses
    assert run.checksums(STEPS) == shared.checksums(STEPS)


def test_memories_are_saved_once(shared):
    names = [path.name for path in (shared.checkpoint(STEPS) / "memory").iterdir()]
    assert sorted(names) == [f"block_{block:03d}.lanes_00000.safetensors" for block in (0, 1)]


def test_waiting_for_other_ranks_is_told(shared):
    for metrics in shared.metrics.values():
        assert 0 < metrics["seconds/waiting_for_context"] < metrics["seconds/pipeline"]


def assert_as(run: Run, other: Run, first: int = 1) -> None:
    """Losses, norms and written masses of each step, from `first` on, and the last memories."""
    for step in range(first, STEPS + 1):
        for name, value in other.metrics[step].items():
            if name.startswith(("train/loss", "train/gradient", "train/tokens", "memory/write_m")):
                assert run.metrics[step][name] == pytest.approx(value, rel=1e-5), name
    ours, theirs = (run.checkpoint(STEPS) / "memory", other.checkpoint(STEPS) / "memory")
    for path in theirs.iterdir():
        for name, expected in load_file(path).items():
            actual = load_file(ours / path.name)[name]
            assert actual.shape == expected.shape
            if not expected.numel():  # some rules have no norm
                continue
            assert torch.allclose(actual, expected, rtol=1e-3, atol=1e-4 * expected.abs().max())


def held_out(run: Run) -> list[dict[str, float]]:
    """Figures of all evaluations of the run."""
    lines = (run.output / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [record for record in records if "held_out/loss" in record]


def test_training_and_evaluation_are_those_of_one_process(finished):
    alone, run = finished(1), finished(2)
    assert_as(run, alone)
    evaluations = held_out(alone)
    assert len(evaluations) == 3
    for ours, theirs in zip(held_out(run), evaluations, strict=True):
        for name, value in theirs.items():
            if name.startswith("held_out"):
                assert ours[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_run_goes_on_with_other_ranks_that_share_windows(
    tmp_path, data, finished, before, after, rule
):
    original = finished(before, rule)
    settings = {**FP32, "model__memory_rule": rule}
    run = without_checkpoints_after(copied(original, tmp_path, data, **settings), SAVED)
    assert f"at step {SAVED}\n" in run.finish(after, f"parallel.context_parallel={after}")
    assert_as(run, original, first=SAVED + 1)


@pytest.mark.slow
def test_ranks_that_shared_windows_have_lanes_of_their_own_from_there_on(tmp_path, data, finished):
    """The same ranks, so DeepSpeed's files are read as they are."""
    run = without_checkpoints_after(copied(finished(2), tmp_path, data, **FP32), SAVED)
    run.finish(2, "parallel.pipeline_stages=1")
    for step in range(SAVED + 1, STEPS + 1):
        assert run.losses[step] == pytest.approx(finished(2).losses[step], rel=1e-5)


@pytest.mark.slow
def test_a_pipeline_of_ranks_that_share_windows_goes_on_from_one_process(tmp_path, data, finished):
    run = without_checkpoints_after(copied(finished(1), tmp_path, data, **FP32), SAVED)
    output = run.finish(4, SHARED)
    assert "2 pipeline stages x 2 data-parallel (2 ranks to a window)" in output
    assert_as(run, finished(1), first=SAVED + 1)


@pytest.mark.parametrize(
    ("world", "overrides", "message"),
    [
        (2, [SHARED, "train.window_segments=2"],
         "parallel.context_parallel (2) must divide the segments of a chunk (1 ="),
        (1, [SHARED], "parallel.context_parallel (2) must divide the number of processes (1); "
         "start 2, or lower it"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(tmp_path, data, world, overrides, message):
    run = Run(tmp_path, data, **SETTINGS)
    with run.start(world, *overrides) as ranks:
        assert ranks.wait(START) == [2] * world, ranks.outputs()
        for line in error_lines(ranks):
            assert message in line
    assert not run.output.exists()
