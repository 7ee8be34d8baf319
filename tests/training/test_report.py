import json
from pathlib import Path

import pytest

from infini_ds.system.console import Console
from infini_ds.training.report import report
from tests import tiny

QUALITY = {
    "held_out/loss": 1.1,
    "held_out/perplexity": 3.25,
    "held_out/bits_per_byte": 2.0,
    "held_out_without_memory/loss": 1.4,
    "held_out_without_memory/perplexity": 4.5,
    "held_out_without_memory/bits_per_byte": 3.0,
    "held_out_unigram/bits_per_byte": 4.0,
}


COUNTS = {"skipped_steps": 0, "rollbacks": 0}


@pytest.fixture
def write(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def run(quality, sample="", counts=None) -> tuple[str, dict]:
        config = tiny.run_config(output_dir=str(tmp_path), train={"steps": 70})
        report(config, 70, counts or COUNTS, quality, sample, Console())
        return capsys.readouterr().out, json.loads((tmp_path / "report.json").read_text())

    return run


def test_report_sets_quality_beside_the_baseline(write):
    shown, _ = write(QUALITY)
    rows = {line.split("│")[1].strip(): line for line in shown.splitlines() if "│" in line}
    assert "4.0000" in rows["tokenizer unigram baseline"]
    for part in ("2.0000", "50.0%", "3.25"):
        assert part in rows["model, with memory"]
    for part in ("3.0000", "25.0%", "4.50"):
        assert part in rows["model, memory ablated"]


def test_report_writes_the_same_figures_to_a_file(write):
    _, figures = write(QUALITY)
    assert figures == {"step": 70, **COUNTS, **QUALITY}


def test_report_says_what_to_type_next(write, tmp_path):
    shown, _ = write(QUALITY)
    assert f"tensorboard --logdir {Path(tmp_path) / 'tensorboard'}" in shown
    assert str(tmp_path / "checkpoints" / "step_00000070") in shown
    assert "train.steps=140" in shown


def test_report_shows_the_sample_as_it_is(write):
    shown, _ = write(QUALITY, sample="x = [bold]1[/bold]")
    assert "x = [bold]1[/bold]" in shown


def test_report_without_held_out_documents_has_no_table(write):
    shown, figures = write({})
    assert "bits per byte" not in shown
    assert figures == {"step": 70, **COUNTS}


def test_report_tells_what_was_skipped_on_the_way(write):
    shown, figures = write(QUALITY, counts={"skipped_steps": 3, "rollbacks": 1})
    assert "on the way: 3 skipped steps, 1 rollbacks" in shown
    assert (figures["skipped_steps"], figures["rollbacks"]) == (3, 1)
    assert "on the way" not in write(QUALITY)[0]
