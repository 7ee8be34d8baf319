import hashlib
import json

import pytest

from infini_ds.runs import manifest


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "memory").mkdir()
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "memory" / "block.safetensors").write_bytes(bytes(range(256)))
    files = {
        name: {"size": (tmp_path / name).stat().st_size, "sha256": manifest.sha256(tmp_path / name)}
        for name in manifest.files_of(tmp_path)
    }
    manifest.write(tmp_path, files)
    return tmp_path


def test_read_gives_what_was_written(checkpoint):
    files = manifest.read(checkpoint)
    assert list(files) == ["memory/block.safetensors", "state.json"]
    assert files["state.json"]["size"] == 2
    expected = hashlib.sha256(bytes(range(256))).hexdigest()
    assert files["memory/block.safetensors"]["sha256"] == expected


def test_files_of_leaves_out_the_manifest_and_its_draft(checkpoint):
    (checkpoint / "manifest.json.partial").write_text("")
    assert manifest.files_of(checkpoint) == ["memory/block.safetensors", "state.json"]


def test_write_leaves_no_draft(checkpoint):
    assert not list(checkpoint.glob("*.partial"))


def test_sha256_changes_with_one_bit(checkpoint):
    file = checkpoint / "memory" / "block.safetensors"
    before = manifest.sha256(file)
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    assert manifest.sha256(file) != before


def remove_manifest(folder):
    (folder / manifest.NAME).unlink()


def cut_manifest(folder):
    path = folder / manifest.NAME
    path.write_text(path.read_text()[:-20])


def empty_manifest(folder):
    (folder / manifest.NAME).write_text("")


def manifest_without_files(folder):
    (folder / manifest.NAME).write_text('{"format": 1}')


def manifest_that_is_a_list(folder):
    (folder / manifest.NAME).write_text("[]")


def manifest_of_another_format(folder):
    content = json.loads((folder / manifest.NAME).read_text())
    (folder / manifest.NAME).write_text(json.dumps(content | {"format": 99}))


def remove_file(folder):
    (folder / "state.json").unlink()


def cut_file(folder):
    file = folder / "memory" / "block.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def lengthen_file(folder):
    (folder / "state.json").write_text("{}\n")


MALFORMED = {
    "list": '{"format": 1, "files": []}',
    "null": '{"format": 1, "files": null}',
    "no_size": '{"format": 1, "files": {"state.json": {"sha256": "a"}}}',
    "no_sha256": '{"format": 1, "files": {"state.json": {"size": 2}}}',
    "word": '{"format": 1, "files": {"state.json": {"size": "2", "sha256": "a"}}}',
    "entry": '{"format": 1, "files": {"state.json": 2}}',
    "deep": "[" * 100_000,
    "binary": "\udcff",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_manifest_is_no_manifest(checkpoint, name):
    text = MALFORMED[name].encode(errors="surrogateescape")
    (checkpoint / manifest.NAME).write_bytes(text)
    with pytest.raises(ValueError, match=r"^manifest.json cannot be read \("):
        manifest.read(checkpoint)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_manifest, r"not finished \(no manifest.json\)"),
        (cut_manifest, "manifest.json cannot be read"),
        (empty_manifest, "manifest.json cannot be read"),
        (manifest_without_files, "manifest.json cannot be read"),
        (manifest_that_is_a_list, "manifest.json cannot be read"),
        (manifest_of_another_format, "manifest.json is of format 99, not 1"),
        (remove_file, "state.json is missing"),
        (cut_file, "memory/block.safetensors has 255 bytes, not 256"),
        (lengthen_file, "state.json has 3 bytes, not 2"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_read_names_what_is_wrong(checkpoint, damage, message):
    damage(checkpoint)
    with pytest.raises(ValueError, match=message):
        manifest.read(checkpoint)


def test_directories_are_those_of_steps_newest_first(tmp_path):
    for name in (
        "step_00000002",
        "step_00000010",
        "step_100000000",
        "step_best",
        "step_2",
        "other",
    ):
        (tmp_path / name).mkdir()
    found = [path.name for path in manifest.directories(tmp_path)]
    assert found == ["step_100000000", "step_00000010", "step_00000002"]
    assert manifest.step_of(manifest.directories(tmp_path)[0]) == 100000000
