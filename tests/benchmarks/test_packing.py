"""`infini-ds bench packing`, with few steps of short segments."""

import json

from infini_ds import cli
from infini_ds.benchmarks.packing import KINDS


def test_lengths_have_their_median_and_mean():
    for kind in KINDS:
        lengths = kind.draw(200_000)
        assert abs(sorted(lengths)[100_000] / kind.median - 1) < 0.02
        assert abs(lengths.mean() / kind.mean - 1) < 0.05
        assert lengths.min() >= 2


def test_command_writes_what_it_prints(tmp_path, capsys):
    path = tmp_path / "packing.json"
    command = ["bench", "packing", "--segment-length", "64", "--steps", "2", "--json", str(path)]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    for row in json.loads(path.read_text()):
        assert row["unpacked_useful_tokens"] < row["packed_useful_tokens"] <= 1
        for name in ("unpacked", "packed"):
            assert f"{row[f'{name}_useful_tokens']:.1%}" in shown
            assert f"{row[f'{name}_tokens_per_second']:,.0f}" in shown
        speeds = row["packed_tokens_per_second"] / row["unpacked_tokens_per_second"]
        assert row["ratio"] == speeds
