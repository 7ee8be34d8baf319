"""Traces of a few steps, and of nothing else."""

import gzip
import json

import pytest
import torch

from infini_ds.config import ProfileConfig
from infini_ds.errors import UserError
from infini_ds.training.profile import Profile
from tests import tiny

CPU = torch.device("cpu")


def run(folder, steps, traced) -> list[str]:
    """Runs steps, each of which is one product; what was said."""
    said: list[str] = []
    config = ProfileConfig(steps=traced) if traced else None
    profile = Profile(config, folder, 7, CPU, said.append)
    for step in steps:
        with profile.step(step):
            inside = torch.autograd.profiler._is_profiler_enabled
            assert inside == bool(traced and traced[0] <= step <= traced[1])
            torch.ones(4, 4) @ torch.ones(4, 4)
        torch.ones(4, 4).exp()  # not of a step, such as a checkpoint
    profile.finish(step)
    assert not torch.autograd.profiler._is_profiler_enabled
    return said


def products(path) -> int:
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return sum(event["name"] == "aten::mm" for event in events)


@pytest.mark.parametrize(
    ("steps", "traced", "name", "count"),
    [
        (range(1, 9), [3, 5], "steps_3_to_5", 3),
        (range(1, 9), [8, 8], "steps_8_to_8", 1),
        (range(5, 9), [3, 6], "steps_5_to_6", 2),  # the run went on from a checkpoint
        (range(1, 5), [4, 9], "steps_4_to_4", 1),  # the run ends before the last of them
    ],
)
def test_only_these_steps_are_traced(tmp_path, steps, traced, name, count):
    (line,) = run(tmp_path / "profile", steps, traced)
    assert line.startswith(name.replace("_", " "))
    files = sorted(path.name for path in (tmp_path / "profile").iterdir())
    assert files == [f"{name}_rank_007.operations.txt", f"{name}_rank_007.trace.json.gz"]
    assert products(tmp_path / "profile" / files[1]) == count
    table = (tmp_path / "profile" / files[0]).read_text()
    assert "aten::mm" in table


@pytest.mark.parametrize("traced", [None, [20, 24]])
def test_nothing_is_written_otherwise(tmp_path, traced):
    assert run(tmp_path / "profile", range(1, 4), traced) == []
    assert not (tmp_path / "profile").exists()


def test_a_run_goes_on_where_traces_cannot_be_written(tmp_path):
    (tmp_path / "profile").write_text("in the way")
    (line,) = run(tmp_path / "profile", range(1, 4), [2, 2])
    assert line.startswith(f"warning: {tmp_path / 'profile'}: no traces (")


@pytest.mark.parametrize("steps", [[], [3], [0, 2], [5, 4], [1, 2, 3]])
def test_other_steps_are_refused(steps):
    with pytest.raises(UserError, match=r"train\.profile: steps \(.* must be the first"):
        tiny.run_config(train__profile={"steps": steps})
