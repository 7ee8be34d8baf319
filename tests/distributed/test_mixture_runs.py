"""Runs on a mixture of two corpora, through launch/pretrain.sh and the commands around it."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from infini_ds import cli
from infini_ds.data.prepare import prepare
from infini_ds.data.sentencepiece_tokenizer import train_sentencepiece
from infini_ds.data.store import Store
from infini_ds.runs.export import load_model
from tests.distributed.conftest import Run, copied, without_checkpoints_after

STEPS = 9


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, data):
    """Documents of the tiny corpus, and another one with a weight of 3."""
    folder = tmp_path_factory.mktemp("mixed")
    words = folder / "words.jsonl"
    words.write_text("".join(Path(data.files[0]).read_text().splitlines(keepends=True)[:40]))
    for i in range(60):
        (folder / f"{i}.txt").write_text(f"{i} times {i} is {i * i}. " * (1 + i % 9))
    corpus = data.model_dump(exclude={"tokenizer", "mixture", "packing"})
    numbers = corpus | {"files": [f"{folder}/*.txt"], "store": f"{folder}/store", "weight": 3.0}
    both = {
        "numbers": numbers,
        "words": {**corpus, "files": [str(words)], "store": f"{folder}/words"},
    }
    model = folder / "shared.model"
    train_sentencepiece((path.read_text() for path in folder.glob("*.txt")), 300, model)
    tokenizer = {"kind": "sentencepiece", "model": str(model)}
    mixture = type(data).model_validate({"tokenizer": tokenizer, "mixture": both})
    for each in mixture.corpora.values():
        prepare(each, workers=1)
    return mixture


SETTINGS = {
    "train__dtype": "fp32", "train__steps": STEPS, "train__save_every": 4,
    "optimizer__eps": 1e-5, "optimizer__learning_rate": 1e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory, mixed):
    """The run on one process, from its first step to its last."""
    run = Run(tmp_path_factory.mktemp("alone"), mixed, **SETTINGS)
    run.shown = run.finish(1)  # type: ignore[attr-defined]
    return run


@pytest.mark.parametrize(
    "overrides",
    [[], ["parallel.context_parallel=2", "train.chunks=1"], ["parallel.zero_stage=3"]],
    ids=["pipeline", "context", "zero3"],
)
def test_two_ranks_that_go_on_from_a_checkpoint_have_the_losses_of_one_process(
    tmp_path, mixed, alone, overrides
):
    run = without_checkpoints_after(copied(alone, tmp_path, mixed, **SETTINGS), 4)
    assert "at step 4\n" in run.finish(2, *overrides)
    assert run.losses == pytest.approx(alone.losses, rel=1e-5)


def test_other_weights_change_what_is_read_from_there_on(tmp_path, mixed, alone):
    run = without_checkpoints_after(copied(alone, tmp_path, mixed, **SETTINGS), 4)
    # The documents that were packed together when the run stopped are read first.
    run.finish(1, "data.mixture.words.weight=1e6", "train.steps=160")
    before, after = (run.metrics[step] for step in (80, 160))
    grown = {
        name: after[f"train/epoch/{name}"] - before[f"train/epoch/{name}"]
        for name in ("numbers", "words")
    }
    assert grown["numbers"] <= 1 / 48  # a document at most
    assert grown["words"] > 0.1


def test_each_corpus_is_evaluated(alone, tmp_path):
    figures = json.loads((alone.output / "report.json").read_text())
    for title in ("held_out", "held_out_without_memory", "held_out_unigram"):
        parts = [figures[f"{title}/{name}/bits_per_byte"] for name in ("numbers", "words")]
        assert min(parts) < figures[f"{title}/bits_per_byte"] < max(parts)
    for name in ("numbers", "words"):
        told = figures[f"held_out/{name}/bits_per_byte"]
        assert f"{name}: with memory" in alone.shown
        assert f"{told:.4f}" in alone.shown
        command = ["evaluate", str(alone.output), "--corpus", name]
        assert cli.main([*command, "--json", str(tmp_path / "figures.json")]) == 0
        again = json.loads((tmp_path / "figures.json").read_text())
        assert again["with_memory"]["bits_per_byte"] == pytest.approx(told, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--corpus '': must be one of the run's mixture: numbers, words"),
        (["--corpus", "prose"], "--corpus 'prose': must be one of the run's mixture"),
        (["--corpus", "words", "--documents", "a.txt"], "--corpus words: is for held-out"),
    ],
)
def test_evaluate_wants_the_name_of_a_corpus(alone, capsys, arguments, message):
    assert cli.main(["evaluate", str(alone.output), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_run_and_each_checkpoint_have_the_tokenizer(alone, mixed, tmp_path):
    store = Store.open(mixed.mixture["words"].store)
    checkpoint = alone.checkpoint(STEPS)
    listed = json.loads((checkpoint / "manifest.json").read_text())["files"]
    assert "tokenizer/tokenizer.model" in listed
    kept = (alone.output / "tokenizer" / "tokenizer.model").read_bytes()
    assert kept == (store.path / "tokenizer.model").read_bytes()
    state = json.loads((checkpoint / "state.json").read_text())
    assert state["stores"]["words"] == store.fingerprint
    assert Path(state["directory"]).is_dir()
    taken = shutil.copytree(checkpoint, tmp_path / "taken")
    assert load_model(taken).tokenizer.fingerprint == store.tokenizer.fingerprint


def test_inspect_names_the_stores(alone, mixed, capsys):
    assert cli.main(["inspect", str(alone.output)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    stores = [f"{mixed.mixture[name].store} ({name}" for name in ("numbers", "words")]
    assert all(store in shown for store in stores)


def test_prepare_makes_all_stores(tmp_path, mixed, capsys):
    run = Run(tmp_path, mixed)
    tree = yaml.safe_load(run.config.read_text())
    for name, corpus in tree["data"]["mixture"].items():
        corpus["store"] = str(tmp_path / name)
    run.config.write_text(yaml.safe_dump(tree))
    assert cli.main(["prepare", str(run.config)]) == 0
    for name in ("numbers", "words"):
        assert (tmp_path / name / "manifest.json").is_file()
    capsys.readouterr()
    assert cli.main(["prepare", str(run.config)]) == 0
    assert capsys.readouterr().out.count("already prepared") == 2
