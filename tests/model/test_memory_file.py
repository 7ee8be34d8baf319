"""A document's memory as a file."""

import pytest
import torch
from safetensors.torch import save_file

from infini_ds.errors import UserError
from infini_ds.model.memory import Memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("length", [5, 16, 21])
def test_load_gives_back_what_was_saved(make_model, make_tokens, tmp_path, options, length, dtype):
    model = make_model(memory=options).to(dtype)
    memory = model(make_tokens(2, length)).memory
    path = tmp_path / "memory.safetensors"
    memory.save(path)
    loaded = Memory.load(path)
    assert loaded.lengths == memory.lengths
    for name in ("kv", "norm", "keys", "values", "weights", "tail"):
        saved = getattr(memory, name)
        assert getattr(loaded, name).dtype == saved.dtype
        assert torch.equal(getattr(loaded, name), saved), name
    more = make_tokens(2, 9, seed=1)
    with torch.no_grad():
        assert torch.equal(model(more, memory).logits, model(more, loaded).logits)


def test_file_is_small_when_no_segment_is_open(make_model, make_tokens, tmp_path):
    path = tmp_path / "memory.safetensors"
    memory = make_model()(make_tokens(1, 16)).memory
    memory.save(path)
    assert path.stat().st_size < 4 * (memory.kv.numel() + memory.norm.numel()) + 1000


def test_missing_file_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        Memory.load(tmp_path / "none.safetensors")


def test_file_of_another_kind_is_the_users_mistake(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"kv": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not a memory file"):
        Memory.load(path)
    path.write_text("a text")
    with pytest.raises(UserError, match="cannot be read"):
        Memory.load(path)
    with pytest.raises(UserError, match="cannot be read"):
        Memory.load(tmp_path)


def test_file_is_bound_to_a_fingerprint(make_model, make_tokens, tmp_path):
    memory = make_model()(make_tokens(1, 16)).memory
    bound, free = tmp_path / "bound.safetensors", tmp_path / "free.safetensors"
    memory.save(bound, "a" * 64)
    memory.save(free)
    assert torch.equal(Memory.load(bound, fingerprint="a" * 64).kv, memory.kv)
    assert torch.equal(Memory.load(bound).kv, memory.kv)
    assert torch.equal(Memory.load(free, fingerprint="b" * 64).kv, memory.kv)
    with pytest.raises(UserError, match=r"is of another model \(fingerprint aaaaaaaaaaaa, this"):
        Memory.load(bound, fingerprint="b" * 64)


def test_failed_save_leaves_the_old_file(make_model, make_tokens, tmp_path, monkeypatch):
    path = tmp_path / "memory.safetensors"
    memory = make_model()(make_tokens(1, 16)).memory
    memory.save(path)
    before = path.read_bytes()

    def broken(tensors, path, metadata):
        path = str(path)
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("infini_ds.model.memory.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        memory.save(path)
    assert path.read_bytes() == before
