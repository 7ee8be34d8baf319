import pytest

from infini_ds.errors import UserError
from infini_ds.system.lock import lock


def test_second_run_is_kept_out_until_the_first_ends(tmp_path):
    first = lock(tmp_path / "run", 1.0)
    assert first
    with pytest.raises(UserError, match=r"output_dir .*run: another run writes there"):
        lock(tmp_path / "run", 0.3)
    first.close()
    second = lock(tmp_path / "run", 0.3)
    assert second
    second.close()


def test_file_system_without_locks_has_none(tmp_path, monkeypatch):
    def refuse(file, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("infini_ds.system.lock.fcntl.flock", refuse)
    assert lock(tmp_path, 0.0) is None
