"""Files that appear whole or not at all."""

import pytest

from infini_ds.errors import UserError
from infini_ds.system.whole_file import check_writable, umask, whole_file


def test_file_is_replaced_only_by_a_whole_one(tmp_path):
    place, link = tmp_path / "a.json", tmp_path / "link"
    place.write_text("old")
    link.symlink_to(place)
    with pytest.raises(UserError, match=r"--json .*link: cannot be written \(No space"):  # noqa: PT012, SIM117
        with whole_file(link, "--json") as file:
            file.write_text("half")
            raise OSError(28, "No space left on device")
    assert place.read_text() == "old"
    with whole_file(link, "--json") as file:
        file.write_text("new")
    assert place.read_text() == "new"
    assert link.is_symlink()
    assert place.stat().st_mode & 0o777 == 0o666 & ~umask()
    assert sorted(tmp_path.iterdir()) == [place, link]


@pytest.mark.parametrize("place", ["none/a.json", "file/a.json"])
def test_place_is_known_to_be_unwritable_before_the_work(tmp_path, place):
    (tmp_path / "file").touch()
    check_writable(tmp_path / "a.json", "--json")
    with pytest.raises(UserError, match=r"^--json .*a\.json: cannot be written \("):
        check_writable(tmp_path / place, "--json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
