"""On an accelerator the host runs ahead: nothing that a model computes waits for the device.

The device is not there: its tensors have no data, so what needs a value fails, as does an operator
on tensors of two devices.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths, library_paths

from infini_ds.config.model import KERNEL_RULES
from infini_ds.memory import RULES

SIZES = {
    "vocab_size": 256, "hidden_size": 256, "num_layers": 2, "num_heads": 4, "head_dim": 64,
    "segment_length": 64,
}  # fmt: skip
LEARNED = {
    "memory": {
        "write_gate": True, "write_gate_sees_keys": True, "short_conv": True, "write_penalty": 0.1,
    },
    "num_kv_heads": 2, "qk_norm": True, "attention_bias": True, "tie_embeddings": True,
}  # fmt: skip
SLIDING = {"use_sliding_window": True, "num_kv_heads": 2}
CASES = {
    f"{rule}-{name}-{checkpointing}-{'kernels' if kernels else 'operators'}": {
        "config": SIZES | settings | {"memory_rule": rule},
        "checkpointing": checkpointing,
        "kernels": kernels,
    }
    for rule in RULES
    for name, settings in (("plain", {}), ("learned", LEARNED), ("sliding", SLIDING))
    for checkpointing in ("none", "block")
    for kernels in (True, False)
    if rule in KERNEL_RULES or not kernels
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Operators that touched the host, by case and what was done."""
    library = tmp_path_factory.mktemp("absent") / "absent_device.so"
    compiler = shutil.which("c++") or "g++"
    source = Path(__file__).with_name("absent_device.cpp")
    flags = ["-shared", "-fPIC", "-std=c++20", "-O0"]
    includes = [f"-I{path}" for path in include_paths()]
    libraries = [f"-L{path}" for path in library_paths()] + ["-lc10", "-ltorch_cpu"]
    subprocess.run(
        [compiler, *flags, *includes, str(source), "-o", str(library), *libraries],
        check=True, timeout=300,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.absent_device_worker", str(library)],
        input=json.dumps(list(CASES.values())), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_training_and_reading_touch_no_tensor_of_the_host(found, case):
    assert found[case]["training"] == []
    assert found[case]["reading"] == []


@pytest.mark.parametrize("case", CASES)
def test_a_token_takes_its_position_from_the_host_and_nothing_else(found, case):
    copies = [name for name in found[case]["a_token"] if name == "aten._to_copy.default"]
    assert len(copies) == 1
