"""What is printed is what was meant, whoever reads it."""

import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table

from infini_ds.system.console import Console

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
