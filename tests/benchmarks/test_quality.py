"""The comparison of memories in language modelling: equal reading, positions, what it reports."""

import json
import math
import random

import numpy as np
import pytest
import torch

from infini_ds import cli
from infini_ds import config as configuration
from infini_ds.benchmarks import quality_report, quality_run
from infini_ds.benchmarks.quality_run import Job, run_job
from infini_ds.benchmarks.quality_variants import VARIANTS, WRITE_PENALTY, variant_config
from infini_ds.config import RunConfig
from infini_ds.data.opening import open_data
from infini_ds.data.prepare import prepare
from infini_ds.evaluation.by_position import position_bins
from infini_ds.evaluation.token_kinds import KINDS
from tests import tiny

STEPS, LANES, SEGMENTS, SEGMENT = 2, 2, 4, 8
BINS = position_bins(SEGMENT, 200)
GATED = (
    "linear-write-gate", "gated_delta", "gated_delta-sliding-window",
    "gated_delta_dpfp-sliding-window",
)  # fmt: skip
MEMORIES = ("linear", "delta", *GATED)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A config whose store has documents of 1 to 200 bytes."""
    folder = tmp_path_factory.mktemp("quality")
    drawn = random.Random(0)
    texts = ["".join(drawn.choices("abc ", k=drawn.randint(1, 200))) for _ in range(60)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    path = tiny.write_run(
        folder / "run.yaml",
        output_dir=str(folder / "output"),
        model={"segment_length": SEGMENT},
        data={
            "source": "files", "files": [str(folder / "corpus.jsonl")],
            "store": str(folder / "store"), "held_out_fraction": 0.3,
            "tokenizer": {"kind": "bytes"},
        },
        train={"steps": STEPS, "batch_size": LANES, "window_segments": SEGMENTS},
        optimizer={"warmup_steps": 1},
        evaluation={"max_segments": 60},
    )  # fmt: skip
    prepare(configuration.load(path).data, workers=1)
    return path


@pytest.fixture(scope="module")
def config(path) -> RunConfig:
    config = configuration.load(path)
    store, _ = open_data(config)
    model = config.model.model_copy(update={"vocab_size": store.tokenizer.vocab_size})
    return config.model_copy(update={"model": model})


@pytest.fixture(scope="module")
def runs(config):
    """Figures of a run of each variant, made in this process, and what was told meanwhile."""
    threads = torch.get_num_threads()
    results = {}
    for name in VARIANTS:
        told = []
        figures = run_job(Job(name, variant_config(config, name, 0), 5, BINS), told.append)
        results[name] = figures, told
    torch.set_num_threads(threads)
    return results


def test_all_variants_train_on_as_many_positions(runs):
    for figures, _ in runs.values():
        assert figures["train_positions"] == STEPS * LANES * SEGMENTS * SEGMENT
    tokens = {name: figures["train_tokens"] for name, (figures, _) in runs.items()}
    assert tokens.pop("full-attention") <= STEPS * LANES * SEGMENTS * SEGMENT  # padded otherwise
    assert len(set(tokens.values())) == 1


def test_all_variants_have_almost_as_many_parameters(runs):
    counts = {name: figures["parameters"] for name, (figures, _) in runs.items()}
    gate = 2 * (16 * 2 + 2)  # layers x (weights and biases of two heads)
    for name in GATED:
        assert counts.pop(name) == counts["linear"] + gate
    assert len(set(counts.values())) == 1


def test_all_variants_read_the_same_held_out_tokens(runs, config):
    store, _ = open_data(config)
    expected = int((store.split("held_out").lengths[:5] - 1).sum())
    for figures, _ in runs.values():
        parts = figures["held_out"]["by_position"]
        assert figures["held_out"]["tokens"] == expected == sum(part["tokens"] for part in parts)
        assert [part["tokens"] for part in parts] == [
            part["tokens"] for part in runs["linear"][0]["held_out"]["by_position"]
        ]


def test_kinds_of_tokens_are_told_apart_and_add_up(config):
    """Kinds of tokens that are drawn so that each document has its own loss."""
    store, _ = open_data(config)
    lengths = store.split("held_out").lengths[:5]
    drawn = np.random.default_rng(0)
    kinds = [drawn.integers(len(KINDS), size=length - 1, dtype=np.int8) for length in lengths]
    job = Job("linear", variant_config(config, "linear", 0), 5, BINS, kinds)
    figures = run_job(job, lambda _: None)
    for name in ("held_out", "ablated"):
        by_kind = figures[name]["by_kind"]
        counts = [int(sum((own == kind).sum() for own in kinds)) for kind in range(len(KINDS))]
        assert [by_kind[kind]["tokens"] for kind in KINDS] == counts
        total = sum(one["loss"] * one["tokens"] for one in by_kind.values())
        assert total == pytest.approx(figures[name]["loss"] * figures[name]["tokens"])


def test_only_variants_with_memory_are_ablated(runs):
    ablated = {name for name, (figures, _) in runs.items() if "ablated" in figures}
    assert ablated == set(MEMORIES)


def test_memory_is_of_no_use_to_the_first_segment_of_a_document(runs):
    for name in MEMORIES:
        figures, _ = runs[name]
        on, ablated = figures["held_out"]["by_position"], figures["ablated"]["by_position"]
        assert on[0] == pytest.approx(ablated[0], rel=1e-6)
        assert on[2]["loss"] != pytest.approx(ablated[2]["loss"], rel=1e-9)


@pytest.mark.parametrize("name", VARIANTS)
def test_gates_learn_only_where_there_is_memory(config, name):
    model, _ = quality_run.train(
        Job(name, variant_config(config, name, 0), 5, BINS), lambda *_: None
    )
    began = quality_run.InfiniTransformer(model.config, 0).blocks
    moved = [
        bool((block.self_attn.beta != before.self_attn.beta).any())  # type: ignore[union-attr]
        for block, before in zip(model.blocks, began, strict=True)
    ]
    assert moved == [VARIANTS[name].memory] * 2


def test_only_variants_with_memory_have_one_in_the_layers_that_the_config_says(config):
    memory = configuration.MemoryConfig(layers=(1,))
    model = config.model.model_copy(update={"memory": memory})
    for each, layers in (config, (0, 1)), (config.model_copy(update={"model": model}), (1,)):
        for name, variant in VARIANTS.items():
            own = variant_config(each, name, 0).model
            assert tuple(own.memory_layers) == (layers if variant.memory else ())
    assert variant_config(config, "sliding-window", 0).model.use_sliding_window


def test_a_run_is_reproducible(runs, config):
    job = Job("linear", variant_config(config, "linear", 0), 5, BINS)
    again = run_job(job, lambda _: None)
    first, _ = runs["linear"]
    timeless = {"train_seconds"}
    assert {k: v for k, v in again.items() if k not in timeless} == {
        k: v for k, v in first.items() if k not in timeless
    }


def test_progress_reaches_the_end(runs):
    for figures, told in runs.values():
        shares = [progress.share for progress in told]
        assert shares == sorted(shares)
        assert shares[-1] == 1
        assert max(progress.step for progress in told) == STEPS
        passes = 2 if "ablated" in figures else 1
        read = figures["train_tokens"] + passes * figures["held_out"]["tokens"]
        assert sum(progress.tokens for progress in told) == read


def test_step_with_a_gradient_that_is_not_finite_is_skipped(config, monkeypatch):
    job = Job("linear", variant_config(config, "linear", 0), 5, BINS)
    broken = lambda *arguments: torch.tensor(math.nan)  # noqa: E731
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", broken)
    model, figures = quality_run.train(job, lambda *_: None)
    assert figures["skipped_steps"] == STEPS
    initial = quality_run.InfiniTransformer(job.config.model, 0)
    for one, other in zip(model.parameters(), initial.parameters(), strict=True):
        assert torch.equal(one, other)


def test_write_penalty_is_the_configs_if_it_has_one(config):
    assert variant_config(config, "linear-write-gate", 0).model.memory.write_penalty == (
        WRITE_PENALTY
    )
    memory = configuration.MemoryConfig(write_gate=True, write_penalty=0.5, short_conv=True)
    model = config.model.model_copy(update={"memory": memory})
    gated = config.model_copy(update={"model": model})
    options = variant_config(gated, "linear-write-gate", 0).model.memory
    assert options == memory
    for name in set(VARIANTS) - set(GATED):
        layers = None if VARIANTS[name].memory else ()
        plain = configuration.MemoryConfig(layers=layers, short_conv=True)
        assert variant_config(gated, name, 0).model.memory == plain


def run_of(on: float, ablated: float | None = None) -> dict:
    figures = {
        "parameters": 1, "train_positions": 1, "train_tokens": 1, "held_out": {"bits_per_byte": on}
    }  # fmt: skip
    return figures | ({} if ablated is None else {"ablated": {"bits_per_byte": ablated}})


@pytest.mark.parametrize(
    ("linear", "words"),
    [
        pytest.param([(1.8, 2.1), (1.7, 2.2)], "more than the seeds' spread in linear.", id="yes"),
        pytest.param([(1.8, 2.1), (2.1, 2.4)], "spread in none of linear.", id="gain_in_spread"),
        pytest.param([(1.8, 1.85), (1.7, 1.75)], "in none of linear.", id="ablation_in_spread"),
        pytest.param([(1.8, 2.1)], "any amount (one seed has no spread) in linear.", id="one_seed"),
    ],
)
def test_conclusion_compares_with_the_spread(linear, words):
    variants = [
        quality_report.summarize("segments-only", [run_of(2.0) for _ in linear]),
        quality_report.summarize("linear", [run_of(*bits) for bits in linear]),
    ]
    assert quality_report.conclusion(variants, len(linear)).endswith(words)


def test_conclusion_tells_the_better_variants_from_the_others():
    variants = [
        quality_report.summarize("segments-only", [run_of(2.0)] * 2),
        quality_report.summarize("linear", [run_of(1.8, 2.1)] * 2),
        quality_report.summarize("delta", [run_of(2.1, 2.1)] * 2),
    ]
    assert quality_report.conclusion(variants, 2).endswith(" in linear, not in delta.")
    assert "takes segments-only" in quality_report.conclusion(variants[1:], 2)


@pytest.mark.parametrize("plot", ["a.png", "x[/y].png"])
def test_command_writes_what_it_prints(path, tmp_path, capsys, plot):
    files = {"json": tmp_path / "a.json", "plot": tmp_path / plot}
    files["plot"].parent.mkdir(exist_ok=True)
    options = [f"--{name}={file}" for name, file in files.items()]
    command = ["bench", "quality", str(path), "--variants=segments-only,linear", "--seeds=3"]
    assert cli.main([*command, "--steps=1", *options, "train.batch_size=1"]) == 0
    shown = capsys.readouterr().out
    figures = json.loads(files["json"].read_text())
    assert files["plot"].read_bytes().startswith(b"\x89PNG")
    assert [one["variant"] for one in figures["variants"]] == ["segments-only", "linear"]
    for one in figures["variants"]:
        assert f"{one['bits_per_byte']:.4f}" in shown
        (only,) = one["runs"]
        assert only["seed"] == 3
        assert only["train_positions"] == SEGMENTS * SEGMENT
        assert len(only["held_out"]["by_position"]) == len(figures["bins"])
    assert figures["conclusion"] in shown
    assert f"by position in the document: {files['plot']}\n" in shown


MISTAKES = {
    "variant": (["--variants=linear,cubic"], "--variants (cubic) must be among segments-only, sli"),
    "variant_twice": (["--variants=delta,delta"], "--variants: each must be named once"),
    "seeds": (["--seeds=0,x"], "'0,x': must be integers"),
    "seed_twice": (["--seeds=1,1"], "--seeds: each must be named once"),
    "negative_seed": (["--seeds=-1"], "--seeds (-1) must each be at least 0"),
    "steps": (["--steps=0"], "steps (0) must be at least 1"),
    "json": (["--json=none/a.json"], "--json none/a.json: its directory does not exist"),
    "plot": (["--plot=none/a.png"], "--plot none/a.png: its directory does not exist"),
    "store": (["data.store=none"], "data.store none: not found; run `infini-ds prepare"),
    "vocabulary": (["model.vocab_size=9"], "model.vocab_size (9) must be at least 258"),
    "curriculum": (
        ["train.curriculum.segments=[2]"], "train.curriculum: bench quality reads documents of all",
    ),
    "window": (["train.batch_size=9999"], "segments a step, but data.store has only"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line_with_code_2(path, capsys, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    arguments, message = MISTAKES[name]
    assert cli.main(["bench", "quality", str(path), *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert message in line
