"""The directory of weights on a disk: the run's own, checked before anything is written."""

import os
import shutil
from types import SimpleNamespace

import pytest

from infini_ds.errors import UserError
from infini_ds.model.layers import count_parameters
from infini_ds.parallel import weights_on_disk
from infini_ds.parallel.weights_on_disk import buffers, folder_of, make_folder
from tests.tiny import run_config


def config(folder, output_dir: str = "runs/one"):
    return run_config(
        output_dir=output_dir, model__vocab_size=300, train__dtype="bf16",
        parallel={
            "zero_stage": 3, "offload_optimizer": True, "offload_weights": True,
            "nvme_path": str(folder),
        },
    )  # fmt: skip


def test_each_run_has_a_directory_of_its_own(tmp_path, monkeypatch):
    one, other = (config(tmp_path, f"runs/{name}") for name in ("one", "other"))
    for each in (one, other):
        make_folder(each, 2, "cpu")
        (folder_of(each) / "weights").touch()
    assert folder_of(one).parent == folder_of(other).parent == tmp_path
    monkeypatch.setenv("LOCAL_RANK", "1")
    weights_on_disk.remove(one)
    assert folder_of(one).exists()
    monkeypatch.setenv("LOCAL_RANK", "0")
    weights_on_disk.remove(one)
    assert [*tmp_path.iterdir()] == [folder_of(other)]
    assert [path.name for path in folder_of(other).iterdir()] == ["weights"]


def refused(folder, ranks: int = 4, device: str = "cuda") -> str:
    with pytest.raises(UserError) as caught:
        make_folder(config(folder), ranks, device)
    told = str(caught.value)
    assert told.startswith(f"parallel.nvme_path ({folder}): ")
    assert "\n" not in told
    return told


def test_directory_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()
    assert refused(tmp_path / "file" / "inner").endswith("Not a directory")


def test_file_system_without_direct_writes_is_told(tmp_path, monkeypatch):
    usual = os.open

    def refuse(path, flags, *arguments, **settings):
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return usual(path, flags, *arguments, **settings)

    monkeypatch.setattr(os, "open", refuse)
    assert "(O_DIRECT); name a directory on a local disk" in refused(tmp_path)
    assert not [*folder_of(config(tmp_path)).iterdir()]


def test_disk_must_hold_the_weights_of_all_ranks_of_the_machine(tmp_path, monkeypatch):
    parameters = count_parameters(config(tmp_path).model)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    needed = 2 * 2 * parameters // 4  # bf16, half of the ranks
    for free in (needed, needed - 1):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))  # noqa: B023
        if free == needed:
            make_folder(config(tmp_path), 4, "cuda")
        else:
            assert "; make room, or name another directory" in refused(tmp_path)


def test_one_cpu_process_is_refused(tmp_path):
    assert "must be left out on one CPU process" in refused(tmp_path, 1, "cpu")
    make_folder(config(tmp_path), 1, "cuda")


def test_buffers_take_the_shares_of_a_whole_layer():
    model = config("unused").model
    block, embedding = 7, 300 * model.hidden_size
    assert model.mlp_size * model.hidden_size * 2 < embedding
    assert buffers(model, 7) == (block, -(-embedding // 7))
