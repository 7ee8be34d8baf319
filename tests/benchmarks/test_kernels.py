"""Timing of the Triton kernels, on a CPU with a timer of its own and PyTorch in their place."""

import json
from pathlib import Path

import pytest
import torch

from infini_ds import cli
from infini_ds import config as configuration
from infini_ds.benchmarks import kernels, kernels_model
from infini_ds.benchmarks.kernel_cost import Rates
from infini_ds.benchmarks.kernels_timing import Shape, time_operation
from infini_ds.errors import RunError
from infini_ds.kernels.infini_attention.parallel import infini_attention_parallel
from infini_ds.memory import RULES
from tests import tiny

SMALL = {"num_layers": 1, "segment_length": 8}
SIZES = kernels.Sizes(
    segment_lengths=(8, 16),
    segments=2,
    heads=2,
    head_dim=8,
    accuracy=tuple(Shape(3, 16, 2, 8, rule) for rule in RULES),
    full_tokens=(32, 64),
    models=kernels_model.Models(
        tiny.model_config(**SMALL),
        tiny.model_config(**SMALL, vocab_size=40, memory_rule="delta"),
        tiny.model_config(**SMALL, vocab_size=32),
    ),
    matrix=4,
)
SECONDS = 2e-3


def timer(call) -> float:
    call()
    return SECONDS


TIMERS = kernels.Timers(timer, timer, timer)


def test_every_figure_follows_from_the_times(capsys):
    figures = kernels.measure(infini_attention_parallel, "cpu", TIMERS, SIZES)
    assert json.loads(json.dumps(figures)) == figures
    assert figures["rates"] == {
        "flops": 2 * 4**3 / SECONDS, "bytes": 2 * 16 * 4 * 4 * 2 / SECONDS
    }  # fmt: skip
    assert [(row["rule"], row["segment_length"], row["operation"]) for row in figures["calls"]] == [
        (rule, n, name)
        for rule in ("gated_delta", "delta", "linear")
        for n in (8, 16)
        for name in (kernels.OURS, "PyTorch", "naive PyTorch")
    ]
    rows = 2 * 8 * 2
    delta, forward = figures["calls"][6]["forward"], figures["calls"][12]["forward"]
    assert delta["flops_per_second"] == rows * (2 * 8 * 8 + 6 * 8 * 8) / SECONDS
    assert forward["flops_per_second"] == rows * (2 * 8 * 8 + 4 * 8 * 8) / SECONDS
    assert forward["bytes_per_second"] == rows * (4 * 8 * 2 + 4) / SECONDS
    assert [row["tokens"] for row in figures["full_attention"]] == [32, 64]
    windows = [row["tokens_per_second"] * SECONDS / (2 * 8) for row in figures["steps"]]
    assert windows == [1, 1, 1, 1, 1, 1, kernels_model.DOCUMENT_WINDOWS]
    shown = capsys.readouterr().out
    assert "2 segments, 2 heads of 8" in shown
    assert "64 tokens" in shown
    assert "infini-transformer-pytorch" in shown


def test_what_does_not_fit_is_said_and_the_rest_goes_on(capsys):
    short = kernels.Timers(*[_short_of_memory_after(3)] * 3)
    figures = kernels.measure(infini_attention_parallel, "cpu", short, SIZES)
    first, *others = figures["calls"]
    assert first["forward"]
    assert first["backward"] is None
    assert all(row["forward"] is None and row["backward"] is None for row in others)
    assert all(row["seconds"] is None for row in figures["steps"])
    assert "not enough memory" in capsys.readouterr().out


def _short_of_memory_after(calls: int):
    left = iter(range(calls))

    def short(call) -> float:
        if next(left, None) is None:
            raise torch.OutOfMemoryError
        return timer(call)

    return short


def test_wrong_results_are_not_timed():
    def wrong(inputs):
        out, memory = infini_attention_parallel(inputs)
        return out * 1.15, memory

    def never(call):
        pytest.fail("was timed")

    with pytest.raises(RunError, match=r"wrong results.* out by 1\.5e-01"):
        kernels.measure(wrong, "cpu", kernels.Timers(never, never, never), SIZES)


def test_each_row_is_saved_at_once_and_what_takes_seconds_measured_once(monkeypatch):
    monkeypatch.setattr(kernels, "ONCE_TOKENS", 32)
    saved, called = [], {}

    def counts(name):
        return lambda call: called.update({name: called.get(name, 0) + 1}) or timer(call)

    def save(figures):
        rows = ("calls", "full_attention", "steps")
        saved.append(sum(len(figures.get(name, ())) for name in rows))

    timers = kernels.Timers(counts("operation"), counts("step"), counts("once"))
    kernels.measure(infini_attention_parallel, "cpu", timers, SIZES, save)
    assert saved == list(range(18 + 2 + 7 + 1))
    # Two rates, 18 operations both ways, ours and full attention over 32 tokens; the same over 64,
    # and the document; the other models.
    assert called == {"operation": 2 + 36 + 2, "once": 2 + 1, "step": 6}


def test_backward_is_timed_as_often_as_the_timer_wants():
    def thrice(call) -> float:
        for _ in range(3):
            call()
        return SECONDS

    shape = Shape(2, 8, 2, 8)
    rates = Rates(flops=1.0, bytes=1.0)
    row = time_operation("x", infini_attention_parallel, shape, "cpu", thrice, rates)
    assert row["backward"]["seconds"] == SECONDS


@pytest.mark.parametrize(
    ("name", "model"), [("infini_1b", kernels_model.LARGE), ("infini_paper", kernels_model.PAPER)]
)
def test_models_are_those_of_their_configs(name, model):
    path = Path(__file__).parents[2] / f"configs/{name}.yaml"
    assert configuration.load(str(path), ["model.vocab_size=32000"]).model == model


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_line_names_what_runs_anywhere(capsys):
    assert cli.main(["bench", "kernels"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "needs a CUDA device" in line
    assert "--compile-only" in line
