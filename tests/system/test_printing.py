"""What is printed is what was meant, whoever reads it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table

from infini_ds import cli
from infini_ds import config as configuration
from infini_ds.cluster import preflight
from infini_ds.cluster.findings import Finding
from infini_ds.system.console import Console
from tests import tiny
from tests.tiny_run import tiny_config, write_checkpoint

STRANGE = "[bold]run[/bold] [a-z1]*.txt x[/y] :smile:"


def test_paths_are_printed_as_they_are(capsys):
    console = Console()
    table = Table(title=STRANGE)
    table.add_column(STRANGE)
    table.add_row(STRANGE)
    console.print(STRANGE)
    console.print(table)
    assert capsys.readouterr().out.count(STRANGE) == 4


def test_table_keeps_its_figures_in_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    table = Table("documents", "tokens", "bytes per token")
    table.add_row("1,234,567", "12,345,678", "4.321")
    Console().print(table)
    shown = capsys.readouterr().out
    assert "…" not in shown
    for figure in ("1,234,567", "12,345,678", "4.321"):
        assert figure in shown


def printing_to(target, script="console.print('a')"):
    code = f"from infini_ds.system.console import Console; console = Console(); {script}"
    return subprocess.run(
        [sys.executable, "-c", code], stdout=target, stderr=subprocess.PIPE, text=True, check=False
    )


def test_work_goes_on_when_the_reader_has_gone():
    reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    reader.wait()
    script = "[console.print('a') for _ in range(9)]; import sys; sys.exit('at the end')"
    done = printing_to(reader.stdin, script)
    assert done.stderr == "at the end\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_full_disk_is_told():
    with open("/dev/full", "w") as full:
        done = printing_to(full)
    assert "RunError: standard output: cannot be written (No space left on device)" in done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("printing") / "run"
    config = tiny_config(folder, segment_length=64)
    write_checkpoint(config)
    (folder / "config.yaml").write_text(configuration.dump(config))
    (folder / "metrics.jsonl").touch()
    return folder


COMMANDS = {
    "prepare": ["prepare", "run.yaml", "data.store={quoted}"],
    "prepare_again": ["prepare", "run.yaml", "data.store={quoted}"],
    "status": ["status", "./{name}"],
    "inspect": ["inspect", "./{name}"],
    "inspect_diff": ["inspect", "./{name}", "--diff", "run"],
    "convert": ["convert", "to-safetensors", "run", "{name}"],
    "memorize": ["memorize", "run", "corpus.txt", "-o", "{name}"],
    "evaluate": ["evaluate", "run", "--documents", "corpus.txt", "--plot", "{name}"],
    "passkey": ["passkey", "run", "--segments=3", "--samples=1", "--depths=1", "--plot={name}"],
    "babilong": ["babilong", "run", "--segments=5", "--samples=1", "--tasks=qa1", "--plot={name}"],
}
MARKUP = ["x[/y].png", "[bold]", "[link=x]"]


@pytest.mark.parametrize("name", MARKUP)
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_print_names_as_they_are(run, tmp_path, monkeypatch, capsys, command, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    Path("corpus.txt").write_text("one document of a few words\n" * 20)
    data = {"source": "files", "files": ["corpus.txt"], "tokenizer": {"kind": "bytes"}}
    tiny.write_run(Path("run.yaml"), output_dir="output", data={**data, "store": "store"})
    Path("run").symlink_to(run)
    Path(name).parent.mkdir(exist_ok=True)
    if command.startswith(("status", "inspect")):
        Path(name).symlink_to(run)
    arguments = [part.format(name=name, quoted=json.dumps(name)) for part in COMMANDS[command]]
    if command == "prepare_again":
        assert cli.main(arguments) == 0
        capsys.readouterr()
    assert cli.main(arguments) == 0
    assert name in capsys.readouterr().out
    assert Path(name).exists()


@pytest.mark.parametrize("name", MARKUP)
def test_preflight_prints_names_as_they_are(monkeypatch, capsys, name):
    monkeypatch.setenv("COLUMNS", "300")
    Console().print(preflight._table([Finding(name, name, "good", name, name)]))
    assert capsys.readouterr().out.count(name) == 4


def test_work_that_must_be_read_ends_when_the_reader_has_gone():
    code = (
        "from infini_ds.system.console import Console; from infini_ds.system.exit_code import *; "
        "raise SystemExit(exit_code(lambda: Console(must_be_read=True).print('a')))"
    )
    reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    reader.wait()
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=reader.stdin, stderr=subprocess.PIPE, check=False
    )
    assert (done.returncode, done.stderr) == (141, b"")
