"""A run's model comes out of its checkpoint as the engine had it."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from infini_ds.errors import UserError
from infini_ds.runs.checkpoint import load_run
from tests.damage import flip
from tests.evaluation.conftest import RUNS

torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", RUNS)
def test_model_has_the_logits_of_the_engine(saved, dtype):
    loaded = load_run(saved[dtype] / "output")
    reference = load_file(saved[dtype] / "reference.safetensors")
    assert (loaded.step, loaded.skipped) == (2, [])
    assert loaded.directory == (saved[dtype] / "output").resolve()
    expected = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {expected}
    with torch.no_grad():
        logits = loaded.model(reference["tokens"]).logits
    assert torch.equal(logits, reference["logits"])
    assert loaded.tokenizer.encode("a") == [97]


def test_step_and_directory_choose_the_checkpoint(run):
    assert load_run(run, step=1).step == 1
    assert load_run(run / "checkpoints" / "step_00000001").step == 1


@pytest.mark.parametrize("name", ["layer_01-model_states.pt", "config.yaml"])
def test_damaged_checkpoint_is_passed_over_with_the_reason(run, name):
    newest = run / "checkpoints" / "step_00000002"
    flip(newest / name)
    loaded = load_run(run)
    assert loaded.step == 1
    reason = f"{name} does not have its checksum"
    assert loaded.skipped == [f"checkpoint {newest.resolve()}: passed over, {reason}"]
    with pytest.raises(UserError, match=reason):
        load_run(newest)


def test_damaged_optimizer_state_does_not_matter(run):
    flip(next((run / "checkpoints" / "step_00000002").glob("*optim_states.pt")))
    assert load_run(run).step == 2


def without_manifests(run: Path) -> None:
    for path in run.glob("checkpoints/*/manifest.json"):
        path.unlink()


MISTAKES = {
    "no_such_run": (shutil.rmtree, {}, "no such directory; name the output_dir of a run"),
    "no_checkpoint": (
        lambda run: shutil.rmtree(run / "checkpoints"), {}, "no checkpoint; train it first",
    ),
    "no_valid_checkpoint": (without_manifests, {}, "none of its 2 checkpoints is valid"),
    "no_such_step": (None, {"step": 7}, "has no checkpoint of step 7; there are: 1, 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_names_the_run(run, name):
    spoil, arguments, message = MISTAKES[name]
    if spoil:
        spoil(run)
    with pytest.raises(UserError) as raised:
        load_run(run, **arguments)
    assert str(raised.value).startswith(f"run {run}: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
