"""Whole runs with ZeRO-2 and ZeRO-3: resumed, and gone on with by the other engine."""

import signal

import pytest
import torch

from infini_ds.conversion.masters import MasterWeights
from infini_ds.parallel.deepspeed.operators import build_async_io, build_cpu_adam
from infini_ds.runs.checkpoint import load_run
from infini_ds.runs.weights import CheckpointWeights
from tests.distributed.conftest import Run, assert_equal_states, copied, without_checkpoints_after
from tests.distributed.processes import start_ranks
from tests.distributed.test_runs import END, FP32, START

STEPS = 12
SMALL = {**FP32, "train__micro_batch_size": 1}


IN_HOST_MEMORY = {"parallel__offload_optimizer": True, "parallel__offload_weights": True}
SOME_TRAINED = {"optimizer__train": ["*.self_attn.*"]}


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        pytest.param(2, {}, id="zero2"),
        pytest.param(3, {}, id="zero3"),
        pytest.param(2, SOME_TRAINED, id="zero2_some_trained"),
        pytest.param(
            3, IN_HOST_MEMORY | SOME_TRAINED, id="zero3_in_host_memory_some_trained",
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_run_stopped_twice_equals_the_undisturbed_one(tmp_path, data, stage, more):
    """bf16, and the second part written in the background."""
    settings = {
        "parallel__zero_stage": stage, "model__memory_rule": "gated_delta", "train__steps": STEPS,
        **more,
    }  # fmt: skip
    whole = Run(tmp_path / "whole", data, **settings)
    layout = f"1 pipeline stages x 2 data-parallel (ZeRO-{stage} has no pipeline)"
    assert layout in whole.finish(2)
    assert sorted(whole.losses) == list(range(1, STEPS + 1))
    run = Run(tmp_path / "run", data, **settings)
    for number, after, rank, arguments in (
        (signal.SIGTERM, 3, 0, []), (signal.SIGUSR1, 7, 1, ["train.async_save=true"]),
    ):  # fmt: skip
        with run.start(2, *arguments) as ranks:
            ranks.wait_until(lambda: len(run.losses) >= after, START, f"step {after}")  # noqa: B023
            ranks.all[rank].send(number)
            assert ranks.wait(END) == [0, 0], ranks.outputs()
    assert "resumed from" in run.finish(2)
    assert run.losses == whole.losses
    assert_equal_states(run, whole, STEPS)


@pytest.mark.slow
def test_weights_on_a_disk_change_nothing(tmp_path, data):
    """Matrices of at least a MiB on each rank are written to the disk, as by DeepSpeed's rule; the
    run is stopped once, and what it wrote is removed."""
    build_cpu_adam()  # which takes longer than a run
    build_async_io()
    disk = tmp_path / "disk"
    settings = {
        "model": {"hidden_size": 768, "num_heads": 4, "head_dim": 64, "intermediate_size": 1536},
        "optimizer__train": ["layers.1.*", "*.beta"], "parallel__zero_stage": 3, **IN_HOST_MEMORY,
        "train__steps": 9, "evaluation__every": 3, "evaluation__sample_tokens": 8,
    }  # fmt: skip
    whole = Run(tmp_path / "whole", data, **settings)
    whole.finish(2)
    run = Run(tmp_path / "run", data, **settings, parallel__nvme_path=str(disk))
    with run.start(2) as ranks:
        ranks.wait_until(lambda: len(run.losses) >= 4, START, "step 4")
        written = sum(path.stat().st_size for path in disk.rglob("*.swp"))
        ranks.all[0].send(signal.SIGTERM)
        assert ranks.wait(END) == [0, 0], ranks.outputs()
    assert written > 1e6
    assert "resumed from" in run.finish(2)
    assert run.losses == whole.losses
    assert_equal_states(run, whole, 9)
    assert not list(disk.iterdir())


@pytest.fixture(scope="module")
def source(tmp_path_factory, data):
    """Finished fp32 runs, by pipeline stages, ZeRO stage, processes and tied embeddings."""
    runs: dict = {}

    def of(stages: int, zero: int, world: int, tied: bool) -> Run:
        key = stages, zero, world, tied
        if key not in runs:
            runs[key] = Run(
                tmp_path_factory.mktemp("source"), data, **SMALL, model__tie_embeddings=tied,
                parallel__pipeline_stages=stages, parallel__zero_stage=zero,
            )  # fmt: skip
            assert "Warning" not in runs[key].finish(world)
        return runs[key]

    return of


@pytest.mark.parametrize(
    ("before", "after", "tied"),
    [
        pytest.param((1, 3, 2), (2, 1, 2), False, id="zero3_data2_to_pipeline2"),
        pytest.param((1, 3, 2), (1, 1, 1), True, id="tied_zero3_data2_to_one_process"),
        pytest.param((1, 3, 2), (1, 3, 1), False, id="zero3_data2_to_data1"),
        pytest.param((1, 3, 2), (1, 2, 2), True, id="tied_zero3_data2_to_zero2_data2"),
        pytest.param((1, 2, 2), (1, 3, 1), True, id="tied_zero2_data2_to_zero3_data1"),
        pytest.param((1, 2, 2), (2, 1, 2), True, id="tied_zero2_data2_to_pipeline2"),
        pytest.param((2, 1, 2), (1, 3, 2), True, id="tied_pipeline2_to_zero3_data2"),
        pytest.param((2, 1, 2), (1, 2, 2), False, id="pipeline2_to_zero2_data2"),
        pytest.param((1, 1, 1), (1, 3, 2), False, id="one_process_to_zero3_data2"),
        pytest.param(
            (1, 3, 4), (2, 1, 4), False, id="zero3_data4_to_pipeline2x2", marks=pytest.mark.slow
        ),
        pytest.param(
            (2, 1, 4), (1, 3, 4), True, id="tied_pipeline2x2_to_zero3_data4", marks=pytest.mark.slow
        ),
    ],
)
def test_goes_on_with_the_same_losses(tmp_path, data, source, before, after, tied):
    original = source(*before, tied)
    stages, zero, world = after
    layout = [f"parallel.pipeline_stages={stages}", f"parallel.zero_stage={zero}"]
    run = copied(original, tmp_path, data, **SMALL, model__tie_embeddings=tied)
    without_checkpoints_after(run, 4)
    assert "at step 4\n" in run.finish(world, *layout)
    for step in range(5, 10):
        assert run.losses[step] == pytest.approx(original.losses[step], rel=1e-5)
        norms = (r.metrics[step]["train/gradient_norm"] for r in (run, original))
        assert next(norms) == pytest.approx(next(norms), rel=1e-5)
    assert not list(run.output.glob("checkpoints/universal_*"))


@pytest.mark.parametrize(
    ("more", "tolerance"),
    [({"train__dtype": "bf16"}, 2e-3), (SOME_TRAINED, 1e-5)],
    ids=["bf16", "some_trained"],
)
@pytest.mark.parametrize(
    ("before", "after"),
    [((2, 1), (1, 3)), ((1, 3), (2, 1))],
    ids=["pipeline2_to_zero3", "zero3_to_pipeline2"],
)
def test_a_run_goes_on_by_the_other_engine(tmp_path, data, before, after, more, tolerance):
    def layout(stages: int, zero: int) -> list[str]:
        return [f"parallel.pipeline_stages={stages}", f"parallel.zero_stage={zero}"]

    settings = SMALL | more
    original = Run(tmp_path / "original", data, **settings)
    original.finish(2, *layout(*before))
    run = copied(original, tmp_path / "run", data, **settings)
    without_checkpoints_after(run, 4)
    assert "at step 4\n" in run.finish(2, *layout(*after))
    for step in range(5, 10):
        assert run.losses[step] == pytest.approx(original.losses[step], rel=tolerance)


def test_a_sharded_run_is_loaded_as_any_other(source):
    one, other = (load_run(source(*layout, False).output) for layout in ((1, 3, 2), (2, 1, 2)))
    for name, weight in one.model.named_parameters():
        torch.testing.assert_close(weight, other.model.get_parameter(name), rtol=0, atol=1e-4)


def test_fp32_weights_come_out_of_the_shards(tmp_path, data, source):
    """In an fp32 run they are those that it computes with, trained or not."""
    some = Run(tmp_path, data, **SMALL, **SOME_TRAINED, parallel__zero_stage=3)
    some.finish(2)
    for run in (source(1, 2, 2, True), source(1, 3, 2, True), some):
        checkpoint = run.checkpoint(9)
        computed = CheckpointWeights(checkpoint)
        patterns = SOME_TRAINED["optimizer__train"] if run is some else []
        masters = MasterWeights(checkpoint, computed, patterns)
        for name in computed.metas:
            assert torch.equal(masters.read(name), computed.read(name)), name


LIMITED = """
import resource, sys
from infini_ds.cli import main

resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[1]),) * 2)
sys.exit(main(["pretrain", *sys.argv[2:]]))
"""


@pytest.mark.slow
def test_a_model_too_large_for_one_rank_trains_with_zero_3(tmp_path, data):
    """Weights, gradients and states are 1.4 GiB on each of 4 ranks with ZeRO-1, 0.7 with ZeRO-3."""
    script = tmp_path / "limited.py"
    script.write_text(LIMITED)
    model = {
        "hidden_size": 2560, "num_layers": 4, "num_heads": 4, "head_dim": 64,
        "intermediate_size": 5120, "segment_length": 16,
    }  # fmt: skip
    run = Run(tmp_path, data, model=model, train__steps=2, parallel__pipeline_stages=1)
    limit = int(2.6 * 2**30)
    for zero, codes in ((1, [1] * 4), (3, [0] * 4)):
        overrides = [f"parallel.zero_stage={zero}", "train.micro_batch_size=1"]
        command = [str(script), str(limit), str(run.config), *overrides]
        with start_ranks(command, 4, tmp_path / f"zero{zero}") as ranks:
            assert ranks.wait(300) == codes, ranks.outputs()
            outputs = [process.output for process in ranks.all]
        if zero == 1:
            for output in outputs:
                assert "Traceback" not in output
                assert "can't allocate memory" in output
    assert sorted(run.losses) == [1, 2]
