"""Checkpoints of tiny models, as a run writes them."""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import tiny

# It cannot even be imported without the package that `make test-extras` installs.
collect_ignore = [] if find_spec("lm_eval") else ["test_harness.py"]
WORKER = Path(__file__).with_name("run_worker.py")
WRITING = {"write_gate": True, "write_gate_sees_keys": True, "short_conv": True}
# One bf16 and one fp32 run, that differ in all that changes names, kinds or numbers of weights.
RUNS = {
    "bf16": {"num_kv_heads": 1, "memory_rule": "delta", "memory": WRITING},
    "fp32": {"tie_embeddings": True, "attention_bias": True},
}


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> dict[str, Path]:
    """A folder for each of RUNS: output of checkpoints 1 and 2, and reference.safetensors."""
    folders = {}
    for dtype, model in RUNS.items():
        folders[dtype] = folder = tmp_path_factory.mktemp(dtype)
        sizes = {"vocab_size": 258, "hidden_size": 32, "head_dim": 16, "segment_length": 64}
        tiny.write_run(
            folder / "run.yaml",
            output_dir=str(folder / "output"),
            model={**sizes, **model},
            data={"tokenizer": {"kind": "bytes"}},
            train={"steps": 2, "dtype": dtype},
        )
    configs = [str(folder / "run.yaml") for folder in folders.values()]
    done = subprocess.run(
        [sys.executable, str(WORKER), *configs], capture_output=True, text=True, check=False,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folders


@pytest.fixture
def run(tmp_path, saved) -> Path:
    """A run of its own, that a test may spoil."""
    return Path(shutil.copytree(saved["bf16"] / "output", tmp_path / "run"))
