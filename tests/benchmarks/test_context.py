"""`infini-ds bench context`, with short windows of a tiny model."""

import json

import pytest

from infini_ds import cli
from infini_ds.config import load
from infini_ds.parallel.part import Part

CONFIG = "configs/long_windows.yaml"
TINY = [
    "model.hidden_size=64", "model.num_layers=2", "model.num_heads=2", "model.head_dim=32",
    "model.segment_length=64", "train.dtype=fp32",
]  # fmt: skip


def test_ranks_are_compared_and_their_bytes_are_those_of_the_formula(tmp_path, capfd):
    path = tmp_path / "context.json"
    settings = ["train.chunks=2", "--windows", "256,512", "--repeats=1", "--json", str(path)]
    assert cli.main(["bench", "context", CONFIG, *TINY, *settings]) == 0
    rows = json.loads(path.read_text())
    assert [(row["window"], row["ranks"]) for row in rows] == [
        (256, 1),
        (256, 2),
        (512, 1),
        (512, 2),
    ]
    model = load(CONFIG, TINY).model
    shown = capfd.readouterr().out
    for row in rows:
        part = Part(0, 0, 1, 1, (0, 2), row["ranks"])
        expected = part.step_exchange_bytes(model, 2)
        assert row["exchanged_bytes"] == row["formula_bytes"] == [expected] * row["ranks"]
        assert (expected > 0) == (row["ranks"] > 1)
        assert row["tokens_per_second"] == row["window"] / row["seconds"]
        for name in ("window", "tokens_per_second"):
            assert f"{row[name]:,.0f}" in shown


def test_window_keeps_little_more_than_the_inputs_of_its_blocks(tmp_path):
    """A token costs its share of them, of the last block's output, and itself; no gaps in the heap
    on top."""
    path = tmp_path / "context.json"
    taken = []
    for chunks in (32, 64):  # of 2,048 tokens
        settings = [f"train.chunks={chunks}", "model.segment_length=512", "--windows"]
        settings += [str(chunks * 2048), "--ranks=1", "--repeats=1", "--steps=1"]
        assert cli.main(["bench", "context", CONFIG, *TINY, *settings, "--json", str(path)]) == 0
        (row,) = json.loads(path.read_text())
        taken.append(row["process_bytes"])
    inputs = 2 * 64 * 4  # layers x hidden_size x fp32
    assert (taken[1] - taken[0]) / (32 * 2048) < 1.5 * inputs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param(
            ["--windows", "5000"],
            "--windows (5000) must be a multiple of model.segment_length (512) x train.chunks (8) "
            "x --ranks (1)",
            id="window",
        ),
        pytest.param(["--ranks", "0,1"], "--ranks (0) must each be at least 1", id="ranks"),
        pytest.param(["--ranks", "2,2"], "--ranks: each must be named once", id="twice"),
        pytest.param(["--steps", "0"], "--steps (0) must be at least 1", id="steps"),
    ],
)
def test_mistake_is_one_line_of_code_2(settings, message, capsys):
    assert cli.main(["bench", "context", CONFIG, *settings]) == 2
    assert capsys.readouterr().err == f"infini-ds: {message}\n"
