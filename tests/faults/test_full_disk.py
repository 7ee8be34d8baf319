"""A disk that is full under each of the writers: one line, and nothing is left half-written."""

import os
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from rich.table import Table

from infini_ds import cli
from infini_ds.config import DataConfig, TokenizerConfig
from infini_ds.data.prepare import prepare
from infini_ds.errors import RunError, UserError
from infini_ds.evaluation.results import Places, Results
from infini_ds.evaluation.results import write as write_results
from infini_ds.model.transformer import InfiniTransformer
from infini_ds.runs import failures
from infini_ds.system.console import Console
from infini_ds.system.figures import write_figures
from infini_ds.system.lock import lock
from infini_ds.system.whole_file import check_writable, whole_file
from infini_ds.training.monitor import Monitor
from infini_ds.training.report import report
from tests.faults.test_disks import disk
from tests.tiny_run import tiny_config, write_checkpoint

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small disk")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory on a disk with room for names alone, and `run` beside it with a checkpoint."""
    folder = tmp_path_factory.mktemp("full")
    write_checkpoint(tiny_config(folder / "run"))
    (folder / "corpus.txt").write_text("a document of some words\n" * 50)
    with disk(folder / "disk", "size=64k"):
        place = folder / "disk" / "place"
        (place / "output").mkdir(parents=True)
        with open(folder / "disk" / "filler", "wb", buffering=0) as filler:
            for block in (4096, 1):
                try:
                    while filler.write(bytes(block)) == block:
                        pass
                except OSError:
                    continue
        yield place


def store(place: Path) -> None:
    data = DataConfig(
        source="files", files=[str(place.parents[1] / "corpus.txt")], store=str(place / "store"),
        document_separator="\n", tokenizer=TokenizerConfig(kind="bytes"),
    )  # fmt: skip
    prepare(data, workers=1)


def results(place: Path, *parts: str) -> None:
    """Of an evaluation, those parts of it on the disk."""
    elsewhere = place.parents[1]
    where = [place if part in parts else elsewhere for part in ("json", "plot", "board")]
    places = Places(str(where[0] / "a.json"), where[1] / "a.png", where[2] / "board")
    write_results(
        Results({"step": 1}, Table("found"), Figure(), "a/plot", {"a": 1.0}), places, Console()
    )


def memory(place: Path) -> None:
    model = InfiniTransformer(tiny_config(place).model, 0)
    model(torch.zeros(1, 40, dtype=torch.long)).memory.save(place / "book.safetensors")


def finished(place: Path) -> None:
    config = tiny_config(place / "output")
    report(config, 1, {"skipped_steps": 0}, {}, "", Console())


def checkpoint_config(place: Path) -> None:
    with whole_file(place / "config.yaml", "output_dir", RunError) as file:
        file.write_text("x" * 100)


FULL = "cannot be written (No space left on device); make room there, or name another place"
WRITERS = {
    "prepare": (store, "data.store {place}/store: cannot be written ("),
    "json": (lambda p: write_figures(p / "a.json", [1] * 99), "--json {place}/a.json: " + FULL),
    "json_of_results": (lambda p: results(p, "json"), "--json {place}/a.json: " + FULL),
    "plot": (lambda p: results(p, "plot"), "--plot {place}/a.png: " + FULL),
    "tensorboard_of_results": (
        lambda p: results(p, "board"), "TensorBoard {place}/board: cannot be written (No space",
    ),
    "memory": (memory, "memory {place}/book.safetensors: " + FULL),
    "output_dir": (lambda p: lock(p / "output", 1.0), "output_dir {place}/output/.lock: " + FULL),
    "report": (finished, "output_dir {place}/output/report.json: " + FULL),
    "config_of_a_run": (checkpoint_config, "output_dir {place}/config.yaml: " + FULL),
    "before_the_work": (lambda p: check_writable(p / "a", "--json"), "--json {place}/a: " + FULL),
}  # fmt: skip


# Pytest watches threads by the same hook as TensorBoard's callers here.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("name", WRITERS)
def test_writer_says_what_is_full_and_leaves_nothing(place, name):
    write, line = WRITERS[name]
    before = sorted(place.rglob("*"))
    with pytest.raises((UserError, RunError)) as caught:
        write(place)
    told = str(caught.value)
    assert told.startswith(line.format(place=place))
    assert "make room there, or name another place" in told
    new = {path for path in place.rglob("*") if path not in before and path.name != ".lock"}
    assert not any(path.is_file() and path.parent.name != "board" for path in new), new


@pytest.mark.parametrize(
    ("direction", "name"),
    [("to-safetensors", "a.safetensors"), ("to-safetensors", "export"), ("to-hf", "hf")],
)
def test_conversion_says_what_is_full_and_leaves_nothing(place, capfd, direction, name):
    before = sorted(place.rglob("*"))
    source = place.parents[1] / "run"
    arguments = ["convert", direction, str(source), str(place / name)]
    assert cli.main(arguments) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert "No space left on device; make room there, or name another place" in line
    assert sorted(place.rglob("*")) == before


def test_run_goes_on_without_its_figures_and_says_so_once(place, capfd):
    elsewhere = place.parents[1] / "board"
    elsewhere.mkdir()
    monitor = Monitor(tiny_config(elsewhere), 0)
    monitor._recorders[0]._file = open(place / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115
    for step in (1, 2, 3):
        monitor.record(step, {"train/loss": 1.0})
    shown = capfd.readouterr()
    assert shown.out.count("figures cannot be recorded (No space left on device)") == 1
    assert "Traceback" not in shown.err


def test_rank_that_cannot_put_its_end_on_record_ends_all_the_same(place):
    failures.record(place / "output", 1, "the disk is full")
    assert failures.read(place / "output") == []
