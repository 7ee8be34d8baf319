"""The plan beside the memory that real runs take."""

import subprocess
import sys
from pathlib import Path

import pytest

from infini_ds.config import load
from infini_ds.planning.plan import plan
from tests import tiny
from tests.distributed.conftest import Run, data  # noqa: F401
from tests.distributed.processes import start_ranks

MIB = 2**20
HELD = Path(__file__).with_name("held_worker.py")
LANES = 8
TRAIN = """
import os, sys
from infini_ds.config import load
from infini_ds.system.resources import memory_taken
from infini_ds.training.trainer import pretrain

pretrain(load(sys.argv[1]))
print("peak", memory_taken("VmHWM"), flush=True)
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


WORLD = 2
GRADIENT_BYTES = {"fp32": 4, "bf16": 6}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("zero", "offloaded"),
    [
        (2, []), (3, []), (1, ["optimizer"]), (2, ["optimizer"]), (3, ["optimizer"]),
        (3, ["optimizer", "weights"]), (3, ["optimizer", "weights", "to_a_disk"]),
    ],
    ids=str,
)  # fmt: skip
def test_a_rank_holds_as_much_of_a_larger_model_as_by_plan(tmp_path, zero, offloaded, dtype):
    """Between steps, when ZeRO-1 and 2 have freed gradients on the device and ZeRO-3 has not. Both
    models are larger than the buckets of 50 M numbers in which DeepSpeed reduces gradients, and
    have layers of one size, as its buffers for one have."""
    held, planned = [], []
    for layers in (4, 11):
        path = tiny.write_run(
            tmp_path / f"{layers}.yaml", output_dir=str(tmp_path / "unused"),
            model={
                "vocab_size": 258, "hidden_size": 1536, "num_layers": layers, "num_heads": 4,
                "head_dim": 64, "intermediate_size": 3072, "segment_length": 16,
            },
            data={"packing": False},
            train={"steps": 1, "batch_size": WORLD, "window_segments": 1, "dtype": dtype},
            parallel={
                "zero_stage": zero, "pipeline_stages": 1,
                "offload_optimizer": "optimizer" in offloaded,
                "offload_weights": "weights" in offloaded,
                "nvme_path": str(tmp_path) if "to_a_disk" in offloaded else "",
            },
        )  # fmt: skip
        script = [str(HELD), str(path)]
        with start_ranks(script, WORLD, tmp_path / f"logs{layers}") as ranks:
            assert ranks.wait(400, together=True) == [0] * WORLD, ranks.outputs()
            held.append([int(each.output.split()[-1]) for each in ranks.all])
        needs = plan(load(path), WORLD).stages[0].needs
        gradients = {1: GRADIENT_BYTES[dtype], 2: 0 if offloaded else 4 // WORLD, 3: 0}[zero]
        freed = gradients * needs.parameters
        planned.append(needs.device + needs.offloaded - freed)
    expected = planned[1] - planned[0]
    for small, large in zip(*held, strict=True):
        print(
            f"ZeRO-{zero}, {dtype}, {offloaded} offloaded: {(large - small) / MIB:,.0f} MiB more, "
            f"by plan {expected / MIB:,.0f}"
        )
        assert large - small == pytest.approx(expected, rel=0.05)


EXPORT = """
import sys
from infini_ds.cli import main
from infini_ds.system.resources import memory_taken

assert main(sys.argv[1:]) == 0
print("peak", memory_taken("VmHWM"), flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_starts_saves_and_exports_hold_a_share_and_a_layer(tmp_path, data):  # noqa: F811
    """With ZeRO-3, of a larger model: a rank takes its share more to read weights and to save them,
    and an export takes no more."""
    taken, planned, exporting = [], [], []
    for layers in (4, 11):
        folder, export = tmp_path / str(layers), tmp_path / f"export{layers}"
        settings = {
            "model": {
                "vocab_size": 258, "hidden_size": 1536, "num_layers": layers, "num_heads": 4,
                "head_dim": 64, "intermediate_size": 3072, "segment_length": 16,
            },
            "train": {"steps": 1, "batch_size": WORLD, "window_segments": 1, "dtype": "fp32"},
            "parallel": {"zero_stage": 3},
        }  # fmt: skip
        run = Run(folder / "run", data, **settings)
        run.finish(WORLD)
        command = [sys.executable, "-c", EXPORT, "convert", "to-safetensors", "--dtype", "fp32"]
        done = subprocess.run(
            [*command, str(run.output), str(export)],
            capture_output=True, text=True, timeout=400, check=True,
        )  # fmt: skip
        exporting.append(int(done.stdout.split()[-1]))
        other = Run(folder / "other", data, **settings, init_from=str(export))
        script = [str(HELD), str(other.config), str(folder / "saved")]
        with start_ranks(script, WORLD, folder / "logs") as ranks:
            assert ranks.wait(400, together=True) == [0] * WORLD, ranks.outputs()
            taken.append([[int(x) for x in each.output.split()[-2:]] for each in ranks.all])
        planned.append(plan(load(run.config), WORLD).stages[0].needs)
    more = planned[1].device - planned[0].device
    model = 4 * (planned[1].parameters - planned[0].parameters)
    exported = exporting[1] - exporting[0]
    print(f"export: {exported / MIB:,.0f} MiB more of {model / MIB:,.0f}")
    assert exported < 0.1 * model
    for small, large in zip(*taken, strict=True):
        imported, saved = (after - before for before, after in zip(small, large, strict=True))
        print(
            f"started: {imported / MIB:,.0f} MiB more, and saved {saved / MIB:,.0f}, "
            f"by plan {more / MIB:,.0f}"
        )
        assert imported == pytest.approx(more, rel=0.05)
        assert saved == pytest.approx(more, rel=0.05)
