"""Whole runs whose blocks are compiled, through launch/pretrain.sh."""

import subprocess
import sys

import pytest
import torch

from tests.distributed.conftest import Run, copied, without_checkpoints_after

COMPILED = "train.compile=true"
FP32 = {
    "train__steps": 8, "train__save_every": 8, "train__window_segments": 4, "train__timeout": 100.0,
    "train__dtype": "fp32", "optimizer__eps": 1e-5, "optimizer__learning_rate": 1e-3,
}  # fmt: skip
COUNTING = """
import os, sys
from torch._dynamo.utils import counters
from infini_ds.config import load
from infini_ds.training.trainer import pretrain

pretrain(load(sys.argv[1]))
print("graphs", counters["stats"]["unique_graphs"], "breaks", len(counters["graph_break"]))
sys.stdout.flush()
os._exit(0)  # threads of the process group may abort an orderly exit
"""


def assert_same(run: Run, other: Run, **close) -> None:
    """Compares all losses, and the names and values of the weights at the end."""
    assert run.losses == pytest.approx(other.losses, **{"rel": 1e-5, "abs": 0, **close})
    names = sorted(path.name for path in run.checkpoint(8).glob("layer_*-model_states.pt"))
    assert names == sorted(path.name for path in other.checkpoint(8).glob("layer_*-model_s*.pt"))
    for name in names:
        one, two = (torch.load(each.checkpoint(8) / name) for each in (run, other))
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("checkpointing", "packing"), [("none", True), ("attention", False), ("block", True)]
)
def test_run_is_the_same(tmp_path, data, checkpointing, packing):
    runs = []
    for name in ("false", "true"):
        run = Run(
            tmp_path / name, data, **FP32, train__activation_checkpointing=checkpointing,
            data__packing=packing, train__compile=name == "true",
        )  # fmt: skip
        run.finish(1)
        runs.append(run)
    assert_same(*runs)


@pytest.mark.parametrize(("zero", "graphs"), [(1, 2), (3, 4)])
def test_run_compiles_two_graphs_and_no_more(tmp_path, data, zero, graphs):
    """Whatever the number of layers, steps, evaluations and samples. With ZeRO-3 the first step
    compiles them again, since a module's dict of parameters is DeepSpeed's then."""
    run = Run(
        tmp_path, data, **FP32, model__num_layers=3, train__compile=True, evaluation__every=4,
        evaluation__sample_tokens=9, parallel__zero_stage=zero,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", COUNTING, str(run.config)],
        capture_output=True, text=True, timeout=200, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == f"graphs {graphs} breaks 0"


@pytest.fixture(scope="module")
def plain(tmp_path_factory, data) -> Run:
    """One rank that compiles nothing."""
    run = Run(tmp_path_factory.mktemp("plain"), data, **FP32)
    run.finish(1)
    return run


@pytest.mark.parametrize(
    "layout",
    [
        "parallel.pipeline_stages=2", "parallel.context_parallel=2", "parallel.zero_stage=2",
        "parallel.zero_stage=3",
    ],
)  # fmt: skip
def test_run_of_two_ranks_is_that_of_one(tmp_path, data, plain, layout):
    run = Run(tmp_path, data, **FP32)
    run.finish(2, layout, COMPILED)
    assert_same(run, plain)


def test_run_in_bf16_goes_on_compiled_or_not(tmp_path, data):
    settings = FP32 | {"train__dtype": "bf16", "train__save_every": 4}
    run = Run(tmp_path / "compiled", data, **settings)
    run.finish(2, COMPILED)
    other = without_checkpoints_after(copied(run, tmp_path / "not", data, **settings), 4)
    other.finish(2)
    assert other.losses == pytest.approx(run.losses, rel=1e-2)


def test_run_without_a_compiler_is_refused(tmp_path, data, monkeypatch):
    monkeypatch.setenv("CXX", "none-such-c++")
    with Run(tmp_path, data, **FP32).start(1, COMPILED) as ranks:
        assert ranks.wait(100) == [2]
        (line,) = [line for line in ranks.outputs().splitlines() if "train.compile" in line]
    assert "as there is no C++ compiler none-such-c++ (apt-get install g++, or set CXX)" in line
