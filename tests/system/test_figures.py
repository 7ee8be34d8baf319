"""Figures for programs."""

import json
import math
from pathlib import Path

import pytest

from infini_ds import cli
from infini_ds.errors import UserError
from infini_ds.system.figures import write_figures


def test_figures_are_written_where_they_are_asked_for(tmp_path):
    path = tmp_path / "figures.json"
    write_figures(path, {"loss": 1.5})
    write_figures(None, {"loss": 2.5})
    assert json.loads(path.read_text()) == {"loss": 1.5}


def test_what_is_no_number_is_null(tmp_path):
    path = tmp_path / "figures.json"
    write_figures(path, {"loss": math.nan, "by": [{"loss": math.inf}, (1, 2.5, "nan", None)]})
    assert json.loads(path.read_text()) == {
        "loss": None, "by": [{"loss": None}, [1, 2.5, "nan", None]],
    }  # fmt: skip


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_full_disk_is_one_line_after_what_was_found(capsys):
    with pytest.raises(UserError, match="--json /dev/full: cannot be written"):
        write_figures("/dev/full", {"loss": 1.5})
    quickstart = str(Path(__file__).parents[2] / "configs/quickstart.yaml")
    arguments = ["plan", quickstart, "model.vocab_size=300", "--processes", "2"]
    assert cli.main([*arguments, "--json", "/dev/full"]) == 2
    shown = capsys.readouterr()
    assert "layouts" in shown.out
    (line,) = shown.err.splitlines()
    assert line == (
        "infini-ds: --json /dev/full: cannot be written (No space left on device); make room "
        "there, or name another place"
    )
