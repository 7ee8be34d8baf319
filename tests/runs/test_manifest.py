import hashlib
import json
import re

import pytest

from infini_ds.runs import manifest
from infini_ds.runs.directory import Checkpoint, Depth, RunDirectory


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


def test_listed_gives_what_was_written(checkpoint):
    files = manifest.listed(checkpoint)
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
        manifest.listed(checkpoint)
    (problem,) = manifest.problems(checkpoint, checksums=True)
    assert problem.startswith("manifest.json cannot be read (")


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
def test_sizes_tell_what_is_wrong(checkpoint, damage, message):
    damage(checkpoint)
    (problem,) = manifest.problems(checkpoint, checksums=False)
    assert re.search(message, problem)
    assert Checkpoint(checkpoint).problem(Depth.SIZES) == problem
    assert Checkpoint(checkpoint).problem(Depth.CHECKSUMS) == problem
    finished = (checkpoint / manifest.NAME).exists()
    assert (Checkpoint(checkpoint).problem(Depth.FINISHED) is None) == finished


def test_checksums_tell_what_sizes_do_not(checkpoint):
    (checkpoint / "state.json").write_text("[]")
    block = checkpoint / "memory" / "block.safetensors"
    block.write_bytes(bytes(256))
    found = Checkpoint(checkpoint)
    assert found.problem(Depth.SIZES) is None
    assert found.problem(Depth.CHECKSUMS, ["state.json"]) == "state.json does not have its checksum"
    assert list(manifest.problems(checkpoint, checksums=True)) == [
        "memory/block.safetensors does not have its checksum",
        "state.json does not have its checksum",
    ]
    assert found.problem(Depth.CHECKSUMS, ["other"]) == "other is not in the manifest"
    assert found.problem(Depth.CHECKSUMS, []) is None


def test_all_problems_are_told(checkpoint):
    remove_file(checkpoint)
    cut_file(checkpoint)
    assert len(list(manifest.problems(checkpoint, checksums=False))) == 2


def test_checkpoints_are_those_of_steps_newest_first(tmp_path):
    for name in (
        "step_00000002",
        "step_00000010",
        "step_100000000",
        "step_best",
        "step_2",
        "other",
    ):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    run = RunDirectory(tmp_path)
    names = [checkpoint.path.name for checkpoint in run.checkpoints()]
    assert names == ["step_100000000", "step_00000010", "step_00000002"]
    assert run.checkpoints()[0].step == 100000000
    assert run.newest(Depth.FINISHED) is None
    manifest.write(run.checkpoint(10).path, {})
    assert run.newest(Depth.CHECKSUMS) == run.checkpoint(10)
