"""The comparison of memories in recall: equal documents, whole gradients, what it reports."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from infini_ds import cli
from infini_ds import config as configuration
from infini_ds.benchmarks import recall_report
from infini_ds.benchmarks.recall_run import Job, draw_window, run_job, state_numbers, train
from infini_ds.benchmarks.recall_variants import WHOLE, variant_config, variants
from infini_ds.evaluation.recall import Questions, measure
from infini_ds.layout import IGNORE_INDEX
from infini_ds.memory import RULES
from infini_ds.model.transformer import InfiniTransformer
from infini_ds.runs.export import load_export
from tests import tiny

SEGMENT, LANES, STEPS = 8, 3, 4
QUESTIONS = Questions([2], [0, 1], 3, 10, SEGMENT)
LONGEST = 8 * SEGMENT
"""Tokens of a document with 4 pairs: 3 segments state them, 4 are filler, and 1 asks."""


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tiny.write_run(
        tmp_path_factory.mktemp("recall") / "run.yaml",
        model={"segment_length": SEGMENT, "memory": {"write_gate": True, "write_penalty": 0.01}},
        train={"steps": STEPS, "batch_size": LANES},
        optimizer={"schedule": "wsd", "warmup_steps": 0, "decay_steps": 99},
    )


def job_of(path: Path, name: str, seed: int = 0, distances: tuple[int, ...] = (0, 4)) -> Job:
    config = variant_config(configuration.load(path), name, seed, 10, LONGEST)
    return Job(name, config, name == WHOLE, [2, 4], distances, QUESTIONS, None)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_every_rule_is_a_variant_and_full_attention():
    assert variants() == [*RULES, WHOLE]


@pytest.mark.parametrize("name", variants())
def test_variants_read_the_same_documents(path, name):
    job, linear = job_of(path, name, distances=(4,)), job_of(path, "linear", distances=(4,))
    window, other = draw_window(job, 7, 4), draw_window(linear, 7, 4)
    assert torch.equal(window.tokens, other.tokens)
    assert torch.equal(window.labels, other.labels)
    segments = 1 if name == WHOLE else LONGEST // SEGMENT
    assert window.layout.starts.tolist() == [[True] + [False] * (segments - 1)] * LANES
    assert window.layout.lengths.tolist() == [[LONGEST // segments] * segments] * LANES


def test_document_that_is_shorter_than_the_segment_is_padded(path):
    window = draw_window(job_of(path, WHOLE, distances=(4,)), 0, 2)
    short = draw_window(job_of(path, WHOLE, distances=(0,)), 0, 2)
    assert window.tokens.shape == short.tokens.shape == (LANES, LONGEST)
    assert short.layout.lengths.tolist() == [[4 * SEGMENT]] * LANES
    assert (short.labels[:, 4 * SEGMENT :] == IGNORE_INDEX).all()
    assert ((short.labels != IGNORE_INDEX).sum(dim=1) == 2).all()


def test_documents_differ_between_steps_and_seeds(path):
    job = job_of(path, "linear", distances=(4,))
    first, again = draw_window(job, 0, 4), draw_window(job, 0, 4)
    assert torch.equal(first.tokens, again.tokens)
    for other in (draw_window(job, 1, 4), draw_window(job_of(path, "linear", 1, (4,)), 0, 4)):
        assert not torch.equal(first.tokens, other.tokens)


def test_each_step_draws_its_distance(path):
    job = job_of(path, "linear")
    lengths = {draw_window(job, step, 4).tokens.shape[1] // SEGMENT for step in range(20)}
    assert lengths == {4, 8}


@pytest.mark.long
@pytest.mark.parametrize("name", variants())
def test_whole_model_learns_from_the_answers(path, name):
    job = job_of(path, name)
    model, figures = train(job, lambda *_: None)
    initial = InfiniTransformer(job.config.model, 0)
    unmoved = {
        own
        for (own, after), before in zip(model.named_parameters(), initial.parameters(), strict=True)
        if torch.equal(after, before)
    }
    # Where attention is whole, the memory is silent.
    assert unmoved == {
        own for own, _ in model.named_parameters() if name == WHOLE and "beta" in own
    }
    assert figures["skipped_steps"] == 0
    assert figures["levels_began"] == [0, 2]


def test_learning_rate_falls_to_its_end_in_few_steps(path):
    config = job_of(path, "linear").config
    assert config.optimizer.decay_steps == STEPS


@pytest.mark.long
@pytest.mark.usefixtures("one_thread")
def test_run_is_reproducible_and_its_progress_reaches_the_end(path):
    timed = {"train_seconds", "train_cpu_seconds", "evaluation_cpu_seconds"}
    for name in variants():
        told = []
        figures = run_job(job_of(path, name, distances=(4,)), told.append)
        again = run_job(job_of(path, name, distances=(4,)), lambda _: None)
        assert {k: v for k, v in figures.items() if k not in timed} == {
            k: v for k, v in again.items() if k not in timed
        }
        shares = [progress.share for progress in told]
        assert shares == sorted(shares)
        assert shares[-1] == pytest.approx(1)
        assert {(cell["pairs"], cell["distance"]) for cell in figures["cells"]} == {(2, 0), (2, 1)}


def test_state_is_counted_in_numbers(path):
    model = job_of(path, "linear").config.model
    assert state_numbers(model, whole=False) == 2 * (8 * 8 + 8)  # heads x (M and z)
    whole = job_of(path, WHOLE).config.model
    assert state_numbers(whole, whole=True) == 2 * 2 * 8 * LONGEST  # keys and values


def run_of(*accuracies: float) -> dict:
    cells = [
        {"pairs": 4, "distance": distance, "accuracy": accuracy}
        for distance, accuracy in enumerate(accuracies)
    ]
    return {"parameters": 1, "train_cpu_seconds": 2.0, "cells": cells, "ablated": []}


def test_summary_has_mean_lowest_and_highest_of_the_seeds():
    summary = recall_report.summarize("linear", 5, [run_of(0.5, 1.0), run_of(1.0, 1.0)])
    assert summary["state_numbers_per_layer"] == 5
    assert summary["cells"] == [
        {"pairs": 4, "distance": 0, "accuracy": 0.75, "lowest": 0.5, "highest": 1.0},
        {"pairs": 4, "distance": 1, "accuracy": 1.0, "lowest": 1.0, "highest": 1.0},
    ]


def test_command_trains_saves_and_asks_again(path, tmp_path, capsys):
    options = ["--pairs=2,10", "--distances=0,3", "--documents=4", "--keys=10"]
    files = [f"--json={tmp_path / 'a.json'}", f"--plot={tmp_path / 'a.png'}"]
    command = ["bench", "recall", str(path), f"--rules=delta,{WHOLE}", "--seeds=3,4"]
    saved = tmp_path / "made" / "saved"
    assert cli.main([*command, "--train-pairs=2,3", *options, *files, f"--save={saved}"]) == 0
    shown = capsys.readouterr().out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((tmp_path / "a.json").read_text())
    assert figures["train_pairs"] == [2, 3]
    assert [one["variant"] for one in figures["variants"]] == ["delta", WHOLE]
    for one in figures["variants"]:
        assert [run["seed"] for run in one["runs"]] == [3, 4]
        assert len(one["cells"]) == 4
        for cell in one["cells"]:
            assert f"{cell['accuracy']:.3f} ({cell['lowest']:.3f})" in shown
    assert {path.name for path in saved.iterdir()} == {
        f"{name}_seed_{seed}" for name in ("delta", WHOLE) for seed in (3, 4)
    }
    export = saved / "delta_seed_4"
    model, config = load_export(export)
    assert (config.memory_rule, config.vocab_size) == ("delta", 84)
    (delta, _), (_, run) = figures["variants"], figures["variants"][0]["runs"]
    assert measure(model, Questions([2, 10], [0, 3], 4, 10, SEGMENT), lambda _: None) == {
        "cells": run["cells"], "ablated": run["ablated"]
    }  # fmt: skip

    asked = ["bench", "recall", f"--model={export}", *options, *files]
    assert cli.main(asked) == 0
    assert str(export) in capsys.readouterr().out
    (again,) = json.loads((tmp_path / "a.json").read_text())["variants"]
    assert again["runs"][0]["cells"] == run["cells"]
    assert again["parameters"] == delta["parameters"]

    assert cli.main([*command, "--train-pairs=2,3", *options, *files, f"--save={saved}"]) == 2
    assert f"--save: {saved / 'delta_seed_3'} exists" in capsys.readouterr().err


MISTAKES = {
    "rule": (["--rules=linear,cubic"], "--rules (cubic) must be among linear, delta"),
    "rule_twice": (["--rules=delta,delta"], "--rules: each must be named once"),
    "seeds": (["--seeds=-1"], "--seeds (-1) must each be at least 0"),
    "pairs": (["--pairs=4,97"], "--pairs (97) must each be at most --keys (96)"),
    "no_pairs": (["--pairs=0"], "--pairs (0) must each be at least 1"),
    "train_pairs": (["--train-pairs=64", "--pairs=4", "--keys=9"], "--train-pairs (64) must each"),
    "distances": (["--distances=-1,4"], "--distances (-1) must each be at least 0"),
    "documents": (["--documents=0"], "--documents (0) must be at least 1"),
    "steps": (["--steps=0"], "steps (0) must be at least 1"),
    "vocabulary": (["model.vocab_size=255"], "model.vocab_size (255) must be 0 or at least 256"),
    "segment": (["model.segment_length=1"], "model.segment_length (1) must be at least 2"),
    "plot": (["--plot=none/a.png"], "--plot none/a.png: its directory does not exist"),
    "model_and_config": (["--model=x"], "--model: nothing is trained; leave out CONFIG"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line_with_code_2(path, capsys, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    arguments, message = MISTAKES[name]
    assert message in told_mistake(["bench", "recall", str(path), *arguments], capsys)


MODEL_MISTAKES = {
    "nothing": ([], "CONFIG: name the config of what is to be trained, or trained --model"),
    "steps": (["--model=x", "--steps=3"], "--steps: belongs to training; leave it out"),
    "train_pairs": (["--model=x", "--train-pairs=3"], "--train-pairs: belongs to training"),
    "missing": (["--model=x"], "x: no such file or directory; name an export or a run's"),
    "twice": (["--model", "x", "x"], "--model: each must be named once"),
}


@pytest.mark.parametrize("name", MODEL_MISTAKES)
def test_mistake_without_config_is_one_line_with_code_2(capsys, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    arguments, message = MODEL_MISTAKES[name]
    assert message in told_mistake(["bench", "recall", *arguments], capsys)


def told_mistake(arguments: list[str], capsys) -> str:
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    return line


def test_mistakes_are_told_before_torch_is_loaded(path):
    code = (
        "import sys; from infini_ds import cli; "
        f"assert cli.main(['bench', 'recall', {str(path)!r}, 'model.vocab_size=9']) == 2; "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "False\n"
