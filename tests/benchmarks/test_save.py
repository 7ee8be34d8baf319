"""How long a checkpoint keeps training waiting."""

import json
import subprocess
import sys

import pytest

from infini_ds import cli


def test_command_measures_both_ways_and_leaves_nothing(tmp_path):
    figures = tmp_path / "save.json"
    command = [
        sys.executable, "-m", "infini_ds.cli", "bench", "save", "--sizes", "64,128",
        "--directory", str(tmp_path), "--json", str(figures),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    tree = json.loads(figures.read_text())
    assert tree["processes"] == 2
    for row, size in zip(tree["sizes"], (64, 128), strict=True):
        assert row["hidden_size"] == size
        assert f"{row['share']:.1%}" in done.stdout
        assert row["bytes"] > 12 * row["parameters"], "weights, and the optimizer's states"
        assert all(seconds > 0 for seconds in row["seconds"].values())
        assert row["seconds"]["until_valid"] > row["seconds"]["background"]
    assert [path.name for path in tmp_path.iterdir()] == ["save.json"]


@pytest.mark.parametrize("sizes", ["100", "64,64", "0", "a"])
def test_other_sizes_are_refused(sizes, capsys):
    assert cli.main(["bench", "save", "--sizes", sizes]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
