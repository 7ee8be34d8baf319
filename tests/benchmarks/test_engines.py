"""The engines side by side, in the same processes."""

import json
import subprocess
import sys

import pytest

from infini_ds import cli


def test_all_engines_train_on_the_same_windows_with_equal_losses(tmp_path):
    figures = tmp_path / "engines.json"
    command = [
        sys.executable, "-m", "infini_ds.cli", "bench", "engines", "--steps", "2",
        "--dtype", "fp32", "--json", str(figures),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "deprecated" not in done.stderr
    rows = json.loads(figures.read_text())["engines"]
    assert [row["engine"] for row in rows] == [
        "pipeline of 2", "ZeRO-1 on 2", "ZeRO-2 on 2", "ZeRO-3 on 2"
    ]  # fmt: skip
    for row in rows:
        assert row["loss"] == pytest.approx(rows[0]["loss"], rel=1e-5)
        speed = row["tokens_per_second"] / rows[0]["tokens_per_second"]
        assert row["ratio"] == pytest.approx(speed)
        assert f"{row['loss']:.5f}" in done.stdout
    alone = rows[1:]
    assert sorted(alone, key=lambda row: -row["kept_bytes"]) == alone
    assert all(row["sent_bytes"] > rows[0]["sent_bytes"] for row in alone)


@pytest.mark.parametrize("processes", ["1", "0"])
def test_fewer_than_two_processes_are_refused(processes, capsys):
    assert cli.main(["bench", "engines", "--processes", processes]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
