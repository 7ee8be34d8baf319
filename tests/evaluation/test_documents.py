"""The figures are the trainer's own, whatever reads the documents."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from infini_ds import cli
from infini_ds import config as configuration
from infini_ds.data import store as store_module
from infini_ds.data.opening import open_data
from infini_ds.data.prepare import prepare
from infini_ds.data.store import Store
from tests import tiny

torch.set_num_threads(1)

SCRIPT = Path(__file__).parents[2] / "launch" / "pretrain.sh"
SEGMENT = 8


@pytest.fixture(scope="module", params=["delta", "gated_delta"])
def trained(request, tmp_path_factory) -> Path:
    """A finished fp32 run on documents of 1 to 300 bytes."""
    folder = tmp_path_factory.mktemp("trained")
    drawn = random.Random(0)
    texts = ["".join(drawn.choices("abc é", k=drawn.randint(1, 300))) for _ in range(60)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    path = tiny.write_run(
        folder / "run.yaml",
        output_dir=str(folder / "run"),
        model={
            "segment_length": SEGMENT, "initializer_range": 0.3, "memory_rule": request.param,
        },
        data={
            "source": "files", "files": [str(folder / "corpus.jsonl")],
            "store": str(folder / "store"), "held_out_fraction": 0.3,
            "tokenizer": {"kind": "bytes"},
        },
        train={"steps": 2, "batch_size": 3, "window_segments": 4, "dtype": "fp32", "threads": 1},
        optimizer={"warmup_steps": 1},
        evaluation={"max_segments": 120, "sample_tokens": 0},
    )  # fmt: skip
    prepare(configuration.load(path).data, workers=1)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(path)], capture_output=True, text=True, check=False,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


def evaluate(trained, tmp_path, *arguments) -> dict:
    command = ["evaluate", str(trained), *map(str, arguments), "--json", str(tmp_path / "a.json")]
    assert cli.main(command) == 0
    return json.loads((tmp_path / "a.json").read_text())


def test_totals_are_those_of_the_trainer(trained, tmp_path, capsys):
    figures = evaluate(trained, tmp_path)
    told = json.loads((trained / "report.json").read_text())
    for name, theirs in (("with_memory", "held_out"), ("ablated", "held_out_without_memory")):
        for measure in ("loss", "perplexity", "bits_per_byte"):
            assert figures[name][measure] == pytest.approx(told[f"{theirs}/{measure}"], rel=1e-6)
        parts = figures[name]["by_position"]
        assert sum(part["tokens"] for part in parts) == figures[name]["tokens"]
        loss = sum(part["loss"] * part["tokens"] for part in parts) / figures[name]["tokens"]
        assert loss == pytest.approx(figures[name]["loss"])
    assert figures["bins"][:4] == [0, SEGMENT, 2 * SEGMENT, 4 * SEGMENT]
    on, ablated = (figures[name]["by_position"] for name in ("with_memory", "ablated"))
    assert on[0]["loss"] == pytest.approx(ablated[0]["loss"], rel=1e-6)
    assert on[1]["loss"] != pytest.approx(ablated[1]["loss"], rel=1e-6)

    shown = capsys.readouterr().out
    for part in (*on, figures["with_memory"], figures["ablated"]):
        assert f"{part['bits_per_byte']:.4f}" in shown
    assert f"perplexity {figures['with_memory']['perplexity']:.4f} with memory" in shown
    assert (trained / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(trained / "tensorboard" / "evaluate")).Reload()
    (event,) = events.Scalars("evaluate/with_memory/bits_per_byte")
    assert (event.step, event.value) == (2, pytest.approx(figures["with_memory"]["bits_per_byte"]))


def test_documents_from_files_are_read_as_those_of_the_store(trained, tmp_path):
    config = configuration.load(trained / "config.yaml")
    store, _ = open_data(config)
    read = write_held_out(store, tmp_path)
    plot = tmp_path / "curve.png"
    figures = evaluate(trained, tmp_path, "--plot", plot, "--documents", tmp_path / "*.txt")
    assert figures["documents"] == read
    held_out = store.split("held_out").lengths
    assert figures["with_memory"]["tokens"] == int((held_out - 1).sum())
    assert plot.read_bytes().startswith(b"\x89PNG")
    files = sorted(tmp_path.glob("*.txt"))
    again = evaluate(trained, tmp_path, "--documents", *files)
    for name in ("with_memory", "ablated"):
        assert again[name] == figures[name]


def write_held_out(store: Store, folder: Path) -> int:
    """Writes each held-out document as a file; how many there are."""
    split = store.split("held_out")
    for document in range(len(split.lengths)):
        text = store.tokenizer.decode(split.tokens(document, 0, 1 << 20).tolist())
        (folder / f"{document:03d}.txt").write_text(text)
    return len(split.lengths)


def test_a_document_may_come_through_a_pipe(trained, tmp_path):
    (tmp_path / "a.txt").write_text("abc é " * 9)
    expected = evaluate(trained, tmp_path, "--documents", tmp_path / "a.txt")
    before = os.dup(0)
    reading, writing = os.pipe()
    os.write(writing, (tmp_path / "a.txt").read_bytes())
    os.close(writing)
    try:
        os.dup2(reading, 0)
        figures = evaluate(trained, tmp_path, "--documents", "-")
    finally:
        os.dup2(before, 0)
        os.close(before)
        os.close(reading)
    assert figures["with_memory"] == expected["with_memory"]


MISTAKES = {
    "files": (["--documents=none.txt"], "--documents none.txt: no such file"),
    "kind": (["--documents={trained}/config.yaml"], "must be .txt, .jsonl"),
    "empty": (["--documents={trained}/empty.txt"], "empty.txt: no text in them"),
    "json": (["--json=none/a.json"], "--json none/a.json: its directory does not exist"),
    "plot": (["--plot=none/a.png"], "--plot none/a.png: its directory does not exist"),
    "step": (["--step=7"], "has no checkpoint of step 7; there are: 2"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line_with_code_2(trained, capsys, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    (trained / "empty.txt").touch()
    arguments, message = MISTAKES[name]
    given = [each.format(trained=trained) for each in arguments]
    assert cli.main(["evaluate", str(trained), *given]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert message in line


def test_corrupt_held_out_document_is_one_line_with_code_2(trained, capsys, monkeypatch):
    monkeypatch.setattr(store_module, "_CHECKED_ON_OPEN", 0)  # as if the file were large
    path = trained.parent / "store" / "held_out.tokens"
    whole = path.read_bytes()
    try:
        path.write_bytes(b"\xff\xff" + whole[2:])
        assert cli.main(["evaluate", str(trained)]) == 2
    finally:
        path.write_bytes(whole)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"held_out\.tokens: document \d+ holds tokens that its tokenizer", line)


def test_trained_checkpoint_is_whole_when_it_is_inspected(trained, tmp_path):
    file = tmp_path / "inspected.json"
    assert cli.main(["inspect", str(trained), "--json", str(file)]) == 0
    newest = json.loads(file.read_text())["newest_valid"]
    assert newest["problems"] == []
    assert newest["layout"] == {"pipeline": 1, "data": 1, "zero_stage": 1}
    assert len(newest["gates"]) == 2
    assert all(newest["bytes"][part] > 0 for part in ("weights", "optimizer", "memories"))
