"""Whole runs through launch/pretrain.sh: resumed, moved, killed, stopped, broken."""

import gzip
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from infini_ds.data.prepare import prepare
from infini_ds.errors import UserError
from infini_ds.runs.checkpoint import load_run
from infini_ds.runs.export import write_export
from infini_ds.system.compute_type import fastest_type
from infini_ds.system.lock import lock
from tests.damage import cut, flip
from tests.distributed.conftest import (
    SCRIPT,
    Run,
    assert_equal_states,
    copied,
    without_checkpoints_after,
)
from tests.distributed.processes import Process, Processes, free_port

STEPS = 16
START = 60
"""Seconds that anything may take to start."""
END = 30
"""Seconds in which processes must end when another one has."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data) -> Run:
    """bf16 through two stages, from the first step to the last."""
    run = Run(tmp_path_factory.mktemp("undisturbed"), data)
    run.finish(2)
    assert sorted(run.losses) == list(range(1, STEPS + 1))
    return run


class TestExactResume:
    def test_run_stopped_twice_equals_the_undisturbed_one(self, tmp_path, data, undisturbed):
        run = Run(tmp_path, data)
        stops = ((signal.SIGTERM, 3, 0), (signal.SIGUSR1, 8, 1), (signal.SIGINT, 11, 0))
        for number, after, rank in stops:
            with run.start(2) as ranks:
                ranks.wait_until(lambda: len(run.losses) >= after, START, f"step {after}")  # noqa: B023
                ranks.all[rank].send(number)
                assert ranks.wait(END) == [0, 0], ranks.outputs()
                stopped = max(run.losses)
                assert f"stopped as asked at step {stopped}" in ranks.all[0].output
            assert after <= stopped < STEPS
            assert (run.checkpoint(stopped) / "manifest.json").exists()
        output = run.finish(2)
        assert f"resumed from {run.checkpoint(stopped)} at step {stopped}" in output
        assert run.losses == undisturbed.losses
        assert run.checksums(STEPS) == undisturbed.checksums(STEPS)

    def test_checkpoints_written_in_the_background_are_the_same(self, tmp_path, data, undisturbed):
        """Stopped while one may be written, and gone on with in the other way of saving."""
        run = Run(tmp_path, data, train__async_save=True, train__save_every=1)
        with run.start(2) as ranks:
            ranks.wait_until(lambda: len(run.losses) >= 6, START, "step 6")
            ranks.all[1].send(signal.SIGTERM)
            assert ranks.wait(END) == [0, 0], ranks.outputs()
        stopped = max(run.losses)
        for step in range(1, stopped + 1):
            assert not list(run.checkpoint(step).glob("part_*"))
            assert f"step {step}: saved {run.checkpoint(step)}" in ranks.all[0].output
        for step in (5, 10):
            if step <= stopped:
                assert_equal_states(run, undisturbed, step)
        assert f"at step {stopped}" in run.finish(2, "train.save_every=5", "train.async_save=false")
        assert run.losses == undisturbed.losses
        assert run.checksums(STEPS) == undisturbed.checksums(STEPS)
        files = {path.name for path in run.checkpoint(stopped).rglob("*") if path.is_file()}
        others = {path.name for path in run.checkpoint(STEPS).rglob("*") if path.is_file()}
        assert files == others

    def test_every_step_tells_how_much_each_layer_writes(self, undisturbed):
        for step, metrics in undisturbed.metrics.items():
            masses = [metrics[f"memory/write_mass/layer_{layer}"] for layer in range(2)]
            assert all(0 < mass < 1 for mass in masses)
            penalty = 0.1 * min(1, step / 8)
            assert metrics["train/write_penalty"] == pytest.approx(penalty * sum(masses))
            assert all(0 <= metrics[f"memory/write_zeros/layer_{layer}"] < 1 for layer in range(2))

    def test_run_by_a_rule_without_norm_goes_on_as_if_undisturbed(self, tmp_path, data):
        settings = {"model__memory_rule": "gated_delta", "train__steps": 8}
        whole = Run(tmp_path / "whole", data, **settings)
        whole.finish(2)
        norms = [
            load_file(path)["norm"] for path in (whole.checkpoint(5) / "memory").glob("*.safe*")
        ]
        assert len(norms) == 2
        assert not any(norm.numel() for norm in norms)
        run = without_checkpoints_after(copied(whole, tmp_path / "run", data, **settings), 5)
        assert f"resumed from {run.checkpoint(5)} at step 5" in run.finish(2)
        assert sorted(run.losses) == list(range(1, 9))
        assert run.losses == whole.losses
        assert run.checksums(8) == whole.checksums(8)

    def test_run_with_muon_on_ranks_that_share_its_states_goes_on_as_if_undisturbed(
        self, tmp_path, data
    ):
        """Also where the checkpoint was written in the background."""
        settings = {
            "optimizer__name": "muon", "train__steps": 8, "parallel__pipeline_stages": 1,
        }  # fmt: skip
        whole = Run(tmp_path / "whole", data, **settings, train__async_save=True)
        assert "untested optimizer" not in whole.finish(2)
        run = without_checkpoints_after(copied(whole, tmp_path / "run", data, **settings), 5)
        assert f"resumed from {run.checkpoint(5)} at step 5" in run.finish(2)
        assert sorted(run.losses) == list(range(1, 9))
        assert run.losses == whole.losses
        assert_equal_states(run, whole, 8)

    def test_finished_run_started_again_changes_nothing(self, tmp_path, data, undisturbed):
        run = copied(undisturbed, tmp_path, data)
        run.finish(2)
        assert run.losses == undisturbed.losses
        assert run.checksums(STEPS) == undisturbed.checksums(STEPS)


def test_traces_of_every_rank_name_stages_and_units_and_change_nothing(tmp_path, data, undisturbed):
    run = Run(tmp_path, data, train__profile={"steps": [2, 3]})
    said = run.finish(2)
    assert f"steps 2 to 3: traces of all ranks in {run.output / 'profile'}" in said
    assert run.losses == undisturbed.losses
    for rank in range(2):
        (path,) = (run.output / "profile").glob(f"steps_2_to_3_rank_00{rank}.trace.json.gz")
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
        for kind in ("forward", "backward"):
            for chunk in range(2):
                name = f"stage {rank}: {kind} of micro-batch 1, chunk {chunk}"
                assert names.count(name) == 2, "once a step"
        assert names.count("optimizer") == names.count("sum of gradients") == 2
        assert any(event["name"] == "aten::mm" for event in events)
        table = path.with_name(path.name.replace("trace.json.gz", "operations.txt"))
        assert "Self CPU" in table.read_text()


def test_run_keeps_others_out_of_its_directory_while_it_trains(tmp_path, data):
    run = Run(tmp_path, data, train__steps=100000)
    with run.start(1) as ranks:
        ranks.wait_until(lambda: run.losses, START, "a step")
        with pytest.raises(UserError, match="another run writes there"):
            lock(run.output, 0)


def test_type_is_that_of_the_device_or_of_the_checkpoint(tmp_path, data):
    def dtype_of(run: Run) -> str:
        return yaml.safe_load((run.output / "config.yaml").read_text())["train"]["dtype"]

    run = Run(tmp_path / "chosen", data, train__dtype="auto", train__steps=1)
    said = run.finish(1).splitlines()
    native, why = fastest_type(torch.device("cpu"))
    assert dtype_of(run) == native
    assert f"computes in {native}: {why}" in said
    other = {"bf16": "fp32", "fp32": "bf16"}[native]
    run = Run(tmp_path / "kept", data, train__dtype="auto", train__steps=2)
    said = run.finish(1, f"train.dtype={other}", "train.steps=1").splitlines()
    assert f"computes in {other}: as train.dtype asks" in said
    said = run.finish(1).splitlines()
    assert f"computes in {other}: as the run began" in said
    assert dtype_of(run) == other
    assert sorted(run.losses) == [1, 2]


@pytest.mark.parametrize("zero", [1, 3])
def test_curriculum_takes_in_only_the_steps_that_have_answers(tmp_path, data, zero):
    """One document of twenty has an answer; a step reads four, each once."""
    records = [
        {"turns": [[f"number {i:02d} of the questions ", 1], ["end.", 1]]} for i in range(20)
    ]
    records[7]["turns"][1][1] = 2
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(record) + "\n" for record in records))
    changes = {"files": [str(corpus)], "weighted_field": "turns", "held_out_fraction": 0.0}
    config = data.model_copy(update={**changes, "store": str(tmp_path / "store")})
    prepare(config, workers=1)
    run = Run(
        tmp_path / "run", config, train__steps=5, train__curriculum={"segments": [2]},
        parallel__zero_stage=zero,
    )  # fmt: skip
    run.finish(1)
    answered = [step for step, metrics in run.metrics.items() if "train/exact_match" in metrics]
    assert len(run.metrics) == 5
    assert len(answered) == 1


def test_damaged_checkpoints_are_passed_over_with_the_reason(tmp_path, data, undisturbed, trial):
    run = copied(undisturbed, tmp_path, data)
    flipped, truncated, unfinished = (run.checkpoint(step) for step in (STEPS, 15, 10))
    layer = next(flipped.glob("layer_*"))
    flip(layer)
    memory = next((truncated / "memory").iterdir())
    cut(memory)
    size = memory.stat().st_size
    (unfinished / "manifest.json").unlink()

    with trial("newest checkpoints with a flipped bit, cut short, not finished"):
        output = run.finish(2)
        for directory, reason in (
            (flipped, f"{layer.name} does not have its checksum"),
            (unfinished, "it was not finished (no manifest.json)"),
            (truncated, f"memory/{memory.name} has {size} bytes, not {size + 1}"),
        ):
            assert f"checkpoint {directory}: passed over, {reason}" in output
        assert f"resumed from {run.checkpoint(5)} at step 5" in output
        assert run.losses == undisturbed.losses
        assert run.checksums(STEPS) == undisturbed.checksums(STEPS)


class TestKilledRank:
    @pytest.mark.parametrize("rank", [0, 1])
    @pytest.mark.parametrize(
        ("when", "save_every"),
        [
            pytest.param("between_saves", 5, id="between_saves", marks=pytest.mark.slow),
            pytest.param("during_a_save", 2, id="during_a_save"),
        ],
    )
    def test_costs_only_the_steps_since_the_last_save(
        self, tmp_path, data, undisturbed, when, save_every, rank, trial
    ):
        run = Run(tmp_path, data, train__save_every=save_every)
        with trial("`kill -9` of a rank, then the same command"):
            with run.start(2) as ranks:
                ranks.wait_until(lambda: len(run.losses) >= 6, START, "step 6")
                if when == "during_a_save":
                    # One of the frequent saves is caught halfway.
                    ranks.wait_until(lambda: run.unfinished_save, START, "a save")
                ranks.all[rank].send(signal.SIGKILL)
                codes = ranks.wait(END)
                assert codes[rank] == -signal.SIGKILL
                assert codes[1 - rank] != 0, ranks.outputs()
            saved = max(
                int(p.parent.name[5:]) for p in run.output.glob("checkpoints/*/manifest.json")
            )
            assert saved >= max(run.losses) - save_every
            output = run.finish(2)
            assert f"at step {saved}\n" in output
            assert run.losses == undisturbed.losses
            assert run.checksums(STEPS) == undisturbed.checksums(STEPS)


FP32 = {
    "train__dtype": "fp32", "train__steps": 9, "train__save_every": 4, "train__chunks": 1,
    "optimizer__eps": 1e-5, "optimizer__learning_rate": 1e-3, "model__memory": {},
    "model__num_layers": 4,
}  # fmt: skip
WRITING = {
    "write_gate": True,
    "write_gate_sees_keys": True,
    "write_penalty": 0.1,
    "short_conv": True,
}
KINDS = {
    "plain": FP32,
    "tied": {**FP32, "model__tie_embeddings": True, "model__memory": WRITING},
    # Of two stages, the first has gates to train, and neither weights nor norms.
    "part": {**FP32, "optimizer__train": ["*.beta", "layers.3.self_attn.*", "layers.4.*"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory, data):
    """Finished fp32 runs, by layout and kind."""
    runs: dict = {}

    def of(pipeline: int, data_parallel: int, kind: str) -> Run:
        key = pipeline, data_parallel, kind
        if key not in runs:
            folder = tmp_path_factory.mktemp("source")
            settings = {**KINDS[kind], "parallel__pipeline_stages": pipeline}
            if kind == "part":  # from weights that are not those of its seed
                write_export(load_run(of(2, 1, "plain").output).model, folder / "export")
                settings["init_from"] = str(folder / "export")
            runs[key] = Run(folder, data, **settings)
            assert "Warning" not in runs[key].finish(pipeline * data_parallel)
        return runs[key]

    return of


class TestResumeInAnotherLayout:
    @pytest.mark.parametrize(
        ("before", "after", "kind", "changes"),
        [
            pytest.param((2, 1), (1, 1), "plain", [], id="pipeline2_to_1"),
            pytest.param((2, 1), (2, 2), "plain", [], id="pipeline2_to_2x2"),
            pytest.param(
                (1, 1), (2, 1), "plain", ["train.chunks=2"], id="pipeline1_to_2_in_chunks"
            ),
            pytest.param((2, 1), (4, 1), "plain", [], id="pipeline2_to_4", marks=pytest.mark.slow),
            pytest.param(
                (1, 1), (1, 2), "plain", ["train.micro_batch_size=2"],
                id="data1_to_2_larger_batches",
            ),
            pytest.param((1, 2), (1, 1), "plain", [], id="data2_to_1", marks=pytest.mark.slow),
            pytest.param((2, 1), (1, 1), "tied", [], id="tied_pipeline2_to_1"),
            pytest.param((2, 1), (1, 1), "part", [], id="trained_part_pipeline2_to_1"),
            pytest.param((1, 1), (2, 1), "part", [], id="trained_part_pipeline1_to_2"),
            pytest.param(
                (2, 1), (2, 2), "tied", ["parallel.memory_transport=resident"],
                id="tied_pipeline2_to_2x2_resident", marks=pytest.mark.slow,
            ),
        ],
    )  # fmt: skip
    def test_goes_on_with_the_same_losses(
        self, tmp_path, data, source, before, after, kind, changes
    ):
        original = source(*before, kind)
        odd = str(tmp_path / "layers=[1,2]*?")  # as sweeps name them
        run = copied(original, tmp_path, data, **KINDS[kind], output_dir=odd)
        without_checkpoints_after(run, 4)
        output = run.finish(after[0] * after[1], f"parallel.pipeline_stages={after[0]}", *changes)
        assert "at step 4\n" in output
        assert f"layout: {after[0]} pipeline stages x {after[1]} data-parallel" in output
        for step in range(5, 10):
            assert run.losses[step] == pytest.approx(original.losses[step], rel=1e-5)
            norms = (r.metrics[step]["train/gradient_norm"] for r in (run, original))
            assert next(norms) == pytest.approx(next(norms), rel=1e-5)
        assert not list(run.output.glob("checkpoints/universal_*"))

    @pytest.mark.parametrize(
        ("before", "after"), [((2, 1), (1, 2)), ((1, 2), (2, 1))], ids=["to_data2", "to_pipeline2"]
    )
    def test_muon_goes_on_with_the_same_losses(self, tmp_path, data, before, after):
        """Though its states are not those that DeepSpeed knows."""
        settings = {**FP32, "optimizer__name": "muon"}
        original = Run(tmp_path / "original", data, **settings, parallel__pipeline_stages=before[0])
        original.finish(2)
        run = copied(original, tmp_path / "run", data, **settings)
        without_checkpoints_after(run, 4)
        assert "at step 4\n" in run.finish(2, f"parallel.pipeline_stages={after[0]}")
        for step in range(5, 10):
            assert run.losses[step] == pytest.approx(original.losses[step], rel=1e-5)

    def test_transport_may_change_in_the_same_layout(self, tmp_path, data, source):
        original = source(2, 1, "plain")
        run = copied(original, tmp_path, data, **FP32, output_dir=str(tmp_path / "resident [1]"))
        without_checkpoints_after(run, 4)
        run.finish(2, "parallel.memory_transport=resident")
        assert run.losses == pytest.approx(original.losses, rel=1e-6)

    def test_without_zero_in_fp32_says_what_to_do(self, tmp_path, data):
        run = Run(tmp_path, data, **{**FP32, "parallel__zero_stage": 0, "train__steps": 2})
        run.finish(1)
        with run.start(2, "train.steps=4", "parallel.pipeline_stages=2") as ranks:
            assert ranks.wait(START) == [2, 2], ranks.outputs()
            (line,) = error_lines(ranks)
        assert "pipeline degree 1 and data-parallel degree 1" in line
        assert "can only be resumed in that layout" in line

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ("train.window_segments=4", "train.window_segments (4) must be 2, as in checkpoint"),
            ("optimizer.name=muon", "optimizer.name (muon) must be adamw, as in checkpoint"),
        ],
    )
    def test_setting_that_must_not_change_is_named(self, tmp_path, data, source, change, message):
        run = copied(source(1, 1, "plain"), tmp_path, data, **FP32)
        with run.start(1, change) as ranks:
            assert ranks.wait(START) == [2], ranks.outputs()
            (line,) = error_lines(ranks)
        assert message in line


def error_lines(ranks: Processes) -> list[str]:
    """Lines of errors that a user is shown; there is no traceback."""
    outputs = [process.output for process in ranks.all]
    assert not any("Traceback" in output for output in outputs), ranks.outputs()
    return [
        line for output in outputs for line in output.splitlines() if line.startswith("infini-ds")
    ]


class TestRankFailingAloneAtStart:
    def start(self, tmp_path, data, spoil) -> Processes:
        """Two ranks with working directories of their own; rank 1's store is spoilt."""
        directories = [tmp_path / name for name in ("own0", "own1")]
        for directory in directories:
            shutil.copytree(data.store, directory / "store")
        spoil(directories[1] / "store")
        run = Run(tmp_path / "run", data.model_copy(update={"store": "store"}))
        return run.start(2, directories=directories)

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            pytest.param(shutil.rmtree, "data.store store: not found", id="missing_store"),
            pytest.param(
                lambda store: flip(store / "train.tokens"),
                "data.store store/train.tokens: is damaged",
                id="corrupt_store",
            ),
        ],
    )
    def test_ends_all_ranks_with_one_line(self, tmp_path, data, spoil, message):
        with self.start(tmp_path, data, spoil) as ranks:
            assert ranks.wait(START) == [2, 2], ranks.outputs()
            (line,) = error_lines(ranks)
        assert message in line
        assert line.endswith(f"(rank 1 on {socket.gethostname()})")

    def test_backend_that_cannot_run_is_told_before_the_run_begins(self, tmp_path, data):
        run = Run(tmp_path, data, kernels__backend="triton")
        with run.start(2) as ranks:
            assert ranks.wait(START) == [2, 2], ranks.outputs()
            (line,) = error_lines(ranks)
        assert "kernels.backend: triton needs a CUDA device, not cpu" in line
        assert not (run.output / "failures.jsonl").exists()

    def test_rank_that_never_comes_does_not_hang_the_other(self, tmp_path, data):
        run = Run(tmp_path, data, train__timeout=5.0)
        with run.start(2) as ranks:
            ranks.all[1].kill_group()
            assert ranks.wait(START) == [1, -signal.SIGKILL], ranks.outputs()
            (line,) = error_lines(ranks)
        assert "the 2 processes did not find each other within train.timeout = 5 s" in line


class TestGradientsThatAreNotFinite:
    def test_stop_the_run_and_leave_the_checkpoint(self, tmp_path, data, undisturbed, trial):
        run = copied(undisturbed, tmp_path, data)
        # The first step makes the weights useless, every one after it is skipped.
        overrides = ["optimizer.learning_rate=1e30", "train.max_skipped_steps=3"]
        overrides += ["train.steps=60", "train.save_every=2", "train.keep_last=1"]
        with trial("gradients that are not finite, step after step"):
            with run.start(2, *overrides) as ranks:
                assert ranks.wait(START) == [1, 1], ranks.outputs()
                lines = error_lines(ranks)
            assert lines
            for line in lines:
                assert "the gradient was not finite in 3 steps in a row" in line
                assert "optimizer.learning_rate" in line
            skipped = [run.metrics[step]["train/skipped_steps"] for step in (17, 18, 19)]
            assert skipped == [0, 1, 2]
            # The config's learning rate counts, not the one of when the checkpoint was written.
            assert run.metrics[STEPS + 1]["learning_rate/weights"] > 1e28
            assert max(run.losses) == 19, "the step that ends the run is not written"
            assert max(run.output.glob("checkpoints/step_*")) == run.checkpoint(STEPS)
            assert run.checksums(STEPS) == undisturbed.checksums(STEPS)
            assert "passed over" not in ranks.all[0].output


def launch(command: list[str], folder: Path) -> Processes:
    env = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return Processes([Process(command, folder / "launch.log", env, folder)])


class TestLaunchers:
    @pytest.mark.parametrize(
        ("launcher", "processes"),
        [
            pytest.param(["deepspeed", "--num_accelerators", "2"], 2, id="deepspeed"),
            pytest.param(["bash"], None, id="bash"),
            pytest.param(["torchrun", "--nproc-per-node", "2"], 2, id="torchrun"),
            pytest.param(["python"], 1, id="python"),
        ],
    )
    def test_pretrain_script_starts(self, tmp_path, data, launcher, processes):
        run = Run(tmp_path, data, train__steps=2)
        port = str(free_port())
        options = {"deepspeed": ["--master_port", port], "torchrun": ["--master-port", port]}
        command = [*launcher, *options.get(launcher[0], []), str(SCRIPT), str(run.config)]
        with launch(command, tmp_path) as ended:
            assert ended.wait(120) == [0], ended.outputs()
            output = ended.all[0].output
        assert sorted(run.losses) == [1, 2]
        found = re.search(r"layout: (\d) pipeline stages x (\d) data-parallel", output)
        assert found, output
        world = int(found[1]) * int(found[2])
        assert processes in (None, world)

    def test_mistake_in_the_config_is_one_line_with_code_2(self, tmp_path, data):
        run = Run(tmp_path, data)
        command = [sys.executable, *run.script("train.stepz=1")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=START)
        assert done.returncode == 2
        assert done.stderr.splitlines() == [
            f"infini-ds: config {run.config}: unknown setting train.stepz; did you mean steps?"
        ]
