"""Runs on GPUs beside the same ones on CPUs."""

import pytest
import torch

from tests.distributed.conftest import Run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(("dtype", "limit"), [("fp32", 1e-4), ("bf16", 2e-2)])
def test_losses_are_those_of_a_cpu(tmp_path, data, monkeypatch, dtype, limit):
    """In bf16 through the Triton kernels; a pipeline where there are two GPUs."""
    settings = {
        "model": {
            "hidden_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 64,
            "segment_length": 16, "memory_rule": "delta", "initializer_range": 0.1,
        },
    }  # fmt: skip
    cpu = Run(tmp_path / "cpu", data, **settings, train__dtype="fp32")
    cpu.finish(1, "parallel.pipeline_stages=1")
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    stages = min(2, torch.cuda.device_count())
    gpu = Run(tmp_path / "gpu", data, **settings, train__dtype=dtype)
    gpu.finish(stages, f"parallel.pipeline_stages={stages}")
    assert list(gpu.losses) == list(cpu.losses) == list(range(1, 17))
    for step, loss in cpu.losses.items():
        assert gpu.losses[step] == pytest.approx(loss, rel=limit), step
    gpu.finish(stages, f"parallel.pipeline_stages={stages}", "train.steps=18")
    assert max(gpu.losses) == 18
