"""What a run's directory tells of it."""

import pytest

from infini_ds.runs.directory import REPORT, Depth, RunDirectory


@pytest.mark.parametrize(
    ("report", "step"),
    [
        (b'{"step": 12, "skipped_steps": 3}', 12),
        (b'{"skipped_steps": 3,\n "step":7}', 7),
        (b'{"step": "12"}', 0),
        (b'{"skipped_steps": 3}', 0),
        (b'{"step": 12', 0),
        (b"[12]", 0),
        (b'{"step": "\xff"}', 0),
        (b"", 0),
    ],
)
def test_the_reported_step_is_that_of_a_report_that_can_be_read(tmp_path, report, step):
    (tmp_path / REPORT).write_bytes(report)
    assert RunDirectory(tmp_path).reported_step() == step


def test_a_run_without_a_report_has_not_reported(tmp_path):
    assert RunDirectory(tmp_path / "nowhere").reported_step() == 0


def test_a_report_that_cannot_be_opened_is_not_taken_for_none(tmp_path):
    (tmp_path / REPORT).mkdir()
    with pytest.raises(IsADirectoryError):
        RunDirectory(tmp_path).reported_step()


def test_the_newest_checkpoint_is_the_last_one_by_its_number(tmp_path):
    """Also from where a number has more digits than the others; one without a manifest is none."""
    for name in ("step_00000900", "step_99999999", "step_100000000", "step_latest"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "manifest.json").touch()
    (tmp_path / "checkpoints" / "step_100000001").mkdir()
    newest = RunDirectory(tmp_path).newest(Depth.FINISHED)
    assert newest
    assert newest.step == 100000000
