"""Results are not lost where a file cannot be written, and an export stays as it is."""

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from rich.table import Table

from infini_ds import cli
from infini_ds.errors import RunError, UserError
from infini_ds.evaluation.results import Places, Results, write
from infini_ds.system.console import Console
from tests.tiny_run import tiny_config, write_checkpoint


def results() -> Results:
    table = Table("found")
    return Results({"step": 1, "loss": 2.5}, table, Figure(), "a/plot", {"a/loss": 2.5})


def test_all_that_can_be_written_is_written(tmp_path, capsys):
    (tmp_path / "tensorboard").touch()
    places = Places(str(tmp_path / "a.json"), tmp_path / "a.png", tmp_path / "tensorboard")
    with pytest.raises(UserError, match=r"^TensorBoard .*tensorboard: cannot be written \("):
        write(results(), places, Console())
    assert "found" in capsys.readouterr().out
    assert json.loads((tmp_path / "a.json").read_text())["loss"] == 2.5
    assert places.plot.read_bytes().startswith(b"\x89PNG")


def test_figures_are_written_where_the_table_cannot_be_printed(tmp_path, monkeypatch):
    def full(*_):
        raise RunError("standard output: cannot be written")

    monkeypatch.setattr(Console, "print", full)
    with pytest.raises(RunError):
        write(results(), Places(str(tmp_path / "a.json"), tmp_path / "a.png", None), Console())
    assert json.loads((tmp_path / "a.json").read_text())["loss"] == 2.5


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_full_disk_under_the_plot_is_told_after_the_rest(tmp_path, capsys):
    places = Places(str(tmp_path / "a.json"), Path("/dev/full"), None)
    with pytest.raises(UserError, match=r"^--plot /dev/full: cannot be written \(No space"):
        write(results(), places, Console())
    assert "found" in capsys.readouterr().out
    assert (tmp_path / "a.json").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`run`, its model as `export` and one.safetensors, and book.txt."""
    folder = tmp_path_factory.mktemp("models")
    write_checkpoint(tiny_config(folder / "run", segment_length=64))
    for name in ("export", "one.safetensors"):
        command = ["convert", "to-safetensors", str(folder / "run"), str(folder / name)]
        assert cli.main(command) == 0
    (folder / "book.txt").write_text("line of the book\n" * 20)
    return folder


COMMANDS = {
    "evaluation.png": ["evaluate", "--documents={folder}/book.txt"],
    "passkey.png": ["passkey", "--segments=3", "--samples=1", "--depths=1"],
}


def arguments_of(plot, model):
    command, *rest = (argument.format(folder=model.parent) for argument in COMMANDS[plot])
    return [command, str(model), *rest]


@pytest.mark.parametrize("model", ["export", "one.safetensors"])
@pytest.mark.parametrize("plot", COMMANDS)
def test_nothing_is_written_into_an_export(folder, tmp_path, monkeypatch, model, plot):
    monkeypatch.chdir(tmp_path)
    before = sorted(folder.rglob("*"))
    assert cli.main(arguments_of(plot, folder / model)) == 0
    assert sorted(folder.rglob("*")) == before
    assert [path.name for path in tmp_path.iterdir()] == [plot]


@pytest.mark.parametrize("plot", COMMANDS)
def test_place_that_cannot_be_written_is_told_before_anything_is_read(
    folder, tmp_path, capsys, plot
):
    (tmp_path / "a.png").symlink_to("none/a.png")
    assert cli.main([*arguments_of(plot, folder / "run"), f"--plot={tmp_path}/a.png"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert "a.png: cannot be written (No such file or directory)" in line


def test_run_without_a_place_for_tensorboard_is_evaluated(folder, tmp_path):
    run = tmp_path / "run"
    write_checkpoint(tiny_config(run))
    (run / "tensorboard").touch()
    command = arguments_of("evaluation.png", folder / "run")
    command[1] = str(run)
    assert cli.main(command) == 0
    assert (run / "evaluation.png").exists()
