"""The comparison with the seed library: what it refuses, and what it reports."""

import importlib.util
import json

import pytest

from infini_ds.benchmarks import peer
from infini_ds.errors import UserError


def test_missing_peer_is_the_users_mistake(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'infini-ds\[test\]'"):
        peer.run()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"segments": [1000]}, "must divide"),
        ({"segments": [512], "repeats": 0}, "at least 1"),
        ({"segments": [512], "dtype": "fp16"}, "auto, bf16 or fp32"),
    ],
)
def test_settings_out_of_range_are_the_users_mistake(settings, message):
    with pytest.raises(UserError, match=message):
        peer.run(**settings)


def test_small_comparison_agrees_and_writes_what_it_prints(tmp_path, capsys):
    path = tmp_path / "peer.json"
    rows = peer.run(str(path), segments=[32], repeats=1, dtype="fp32", window_tokens=64)
    assert json.loads(path.read_text()) == rows
    (row,) = rows
    assert row["fp32_check_loss_difference"] < 1e-5
    assert row["loss_difference"] < 1e-5
    assert row["ours_loss"] == row["checkpointed_loss"]
    assert row["ours_loss"] == pytest.approx(row["compiled_loss"], rel=1e-5)
    assert row["gated_delta_loss"] == pytest.approx(row["ours_loss"], rel=0.05)
    assert row["gated_delta_loss"] != row["ours_loss"]
    assert row["gated_delta_peak_mib"] > 0
    shown = capsys.readouterr().out
    assert "one step through 64 tokens" in shown
    assert "ours, gated delta rule" in shown
