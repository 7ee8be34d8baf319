"""The plan beside the memory that real runs take."""

import subprocess
import sys

import pytest

from infini_ds.config import load
from infini_ds.planning.plan import plan
from tests.distributed.conftest import Run, data  # noqa: F401

MIB = 2**20
LANES = 8
TRAIN = """
import os, sys
from infini_ds.config import load
from infini_ds.training.trainer import pretrain

pretrain(load(sys.argv[1]))
(peak,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("peak", int(peak.split()[1]) * 1024, flush=True)
os._exit(0)  # threads of the process group may abort an orderly exit
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_more_lanes_take_as_much_more_as_by_plan(tmp_path, data):  # noqa: F811
    """In fp32, where the plan is of what a CPU computes too, and with nothing computed again, whose
    short peaks an allocator hides."""
    taken, planned = [], []
    for lanes in (1, LANES):
        run = Run(
            tmp_path / str(lanes),
            data,
            model={
                "hidden_size": 512, "num_layers": 4, "num_heads": 8, "head_dim": 64,
                "intermediate_size": 1536, "segment_length": 256, "vocab_size": 258,
            },
            train={
                "steps": 1, "batch_size": lanes, "micro_batch_size": lanes, "window_segments": 4,
                "dtype": "fp32", "threads": 1, "loss_chunk_tokens": 1024,
            },
            optimizer={"learning_rate": 1e-3, "warmup_steps": 1},
            parallel={"pipeline_stages": 1},
        )  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", TRAIN, str(run.config)],
            capture_output=True, text=True, timeout=400, check=True,
        )  # fmt: skip
        taken.append(int(done.stdout.split()[-1]))
        planned.append(plan(load(run.config), 1).most)
    really, expected = (after - before for before, after in (taken, planned))
    print(
        f"{LANES} lanes instead of 1 take {really / MIB:,.0f} MiB more, by plan "
        f"{expected / MIB:,.0f}"
    )
    assert expected == pytest.approx(really, rel=0.2)
