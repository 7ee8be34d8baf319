"""A document's memory as a file."""

import itertools
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from infini_ds.errors import UserError
from infini_ds.generation.generate import load_memory
from infini_ds.memory import RULES
from infini_ds.model.memory import Memory
from infini_ds.system.whole_file import umask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("length", [5, 16, 21])
def test_load_gives_back_what_was_saved(
    make_model, make_tokens, tmp_path, options, rule, length, dtype
):
    model = make_model(**options, memory_rule=rule).to(dtype)
    memory = model(make_tokens(2, length)).memory
    path = tmp_path / "memory.safetensors"
    memory.save(path)
    loaded = Memory.load(path)
    assert (loaded.lengths, loaded.rule) == (memory.lengths, memory.rule)
    assert memory.rule == rule
    assert (memory.norm.shape[-1] == 0) == (not RULES[rule].divides)
    for name in ("kv", "norm", "keys", "values", "weights", "tail", "window"):
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
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()
    assert path.stat().st_size < 4 * (memory.kv.numel() + memory.norm.numel()) + 1000


def test_file_of_a_version_without_windows_is_read(make_model, make_tokens, tmp_path):
    path, model, tokens = tmp_path / "memory.safetensors", make_model(), make_tokens(1, 21)
    memory = model(tokens).memory
    memory.save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys() if name != "window"}  # noqa: SIM118
    save_file(tensors, path, metadata)
    loaded = Memory.load(path)
    loaded.check(model.config, 1)
    assert loaded.window.shape == memory.window.shape


def test_memory_without_a_window_does_not_fit_a_sliding_one(make_model, make_tokens):
    memory = make_model()(make_tokens(1, 21)).memory
    with pytest.raises(ValueError, match="whose use_sliding_window is True"):
        make_model(use_sliding_window=True)(make_tokens(1, 5), memory=memory)


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

    def broken(path, content):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", broken)
    with pytest.raises(UserError, match=r"^memory .*: cannot be written \(No space left on dev"):
        memory.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name")
def test_save_does_not_replace_what_is_no_file(make_model, make_tokens, tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    memory = make_model()(make_tokens(1, 16)).memory
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        memory.save(path)
        assert os.read(reader, 8)
    finally:
        os.close(reader)
    assert path.is_fifo()


METADATA = {
    "lengths": ["junk", "{}", "3", "[]", "[1, 2]", "[-1]", "[9999]", '["a"]', "[true]", "[4]"],
    "segment_length": ["x", "-1", "0", "4", str(10**12), "9" * 30],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in METADATA.items() for value in values]
)
def test_file_with_altered_metadata_is_damaged(make_model, make_tokens, tmp_path, name, value):
    alter(make_model()(make_tokens(1, 21)).memory, tmp_path / "a", {name: value})
    with pytest.raises(UserError, match=r"^memory .*: is damaged; read the document again$"):
        Memory.load(tmp_path / "a")


@pytest.mark.parametrize("name", ["lengths", "segment_length"])
def test_file_without_metadata_is_damaged(make_model, make_tokens, tmp_path, name):
    alter(make_model()(make_tokens(1, 21)).memory, tmp_path / "a", {name: None})
    with pytest.raises(UserError, match=r"is damaged"):
        Memory.load(tmp_path / "a")


TENSORS = {
    "renamed": lambda tensors: {"k": tensors.pop("kv"), **tensors},
    "more": lambda tensors: {**tensors, "more": torch.zeros(1)},
    "other_shape": lambda tensors: {**tensors, "values": tensors["values"][:, :, 1:].clone()},
    "other_heads": lambda tensors: {**tensors, "kv": tensors["kv"][:, :, 1:].clone()},
    "no_dimensions": lambda tensors: {**tensors, "norm": torch.zeros(1)},
    "integers": lambda tensors: {**tensors, "keys": tensors["keys"].int()},
}


@pytest.mark.parametrize("change", TENSORS.values(), ids=TENSORS)
def test_file_with_altered_tensors_is_damaged(make_model, make_tokens, tmp_path, change):
    alter(make_model()(make_tokens(1, 21)).memory, tmp_path / "a", {}, change)
    with pytest.raises(UserError, match=r"is damaged"):
        Memory.load(tmp_path / "a")


@pytest.mark.parametrize(("written", "asked"), list(itertools.permutations(RULES, 2)))
def test_memory_of_another_rule_is_refused(make_model, make_tokens, tmp_path, written, asked):
    """Though two of the rules have memories of equal shapes."""
    memory, path = make_model(memory_rule=written)(make_tokens(1, 21)).memory, tmp_path / "a"
    memory.save(path)
    other = make_model(memory_rule=asked)
    message = f"^memory of rule {written} does not fit this model, whose memory_rule is {asked}$"
    with pytest.raises(ValueError, match=message):
        other(make_tokens(1, 3), memory=Memory.load(path))
    with pytest.raises(UserError, match=rf"^memory {path}: memory of rule {written} does not fit"):
        load_memory(str(path), other)
    with pytest.raises(ValueError, match=r"^memories of different rules \("):
        Memory.concatenate([memory, other(make_tokens(1, 3)).memory])


def test_file_that_does_not_tell_its_rule_fits_by_shape(make_model, make_tokens, tmp_path):
    """As earlier releases wrote them."""
    model, tokens = make_model(memory_rule="delta"), make_tokens(1, 21)
    memory = model(tokens).memory
    alter(memory, tmp_path / "a", {"memory_rule": None})
    loaded = Memory.load(tmp_path / "a")
    assert loaded.rule is None
    assert torch.equal(model(tokens, memory=loaded).logits, model(tokens, memory=memory).logits)
    assert Memory.concatenate([loaded, memory]).rule == "delta"
    with pytest.raises(ValueError, match="memory with norm of shape"):
        make_model(memory_rule="gated_delta")(tokens, memory=loaded)


@pytest.mark.parametrize(("rule", "told"), [("delta", "gated_delta"), ("gated_delta", "linear")])
def test_file_without_what_its_rule_has_is_damaged(make_model, make_tokens, tmp_path, rule, told):
    memory = make_model(memory_rule=rule)(make_tokens(1, 21)).memory
    alter(memory, tmp_path / "a", {"memory_rule": told})
    with pytest.raises(UserError, match=r"is damaged"):
        Memory.load(tmp_path / "a")


def alter(memory, path, metadata, change=lambda tensors: tensors):
    """Saves a memory with other metadata (None: without) and tensors."""
    memory.save(path)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        altered = {**file.metadata(), **metadata}
    known = {name: value for name, value in altered.items() if value is not None}
    save_file(change(tensors), path, known)


def test_memory_with_other_lengths_does_not_fit(make_model, make_tokens):
    model = make_model()
    memory = model(make_tokens(1, 21)).memory
    for lengths in ((-1,), (model.config.segment_length,), (1, 2)):
        with pytest.raises(ValueError, match="memory with lengths"):
            replace(memory, lengths=lengths).check(model.config, 1)
    with pytest.raises(ValueError, match="memory with values of shape"):
        replace(memory, values=memory.values[..., :1]).check(model.config, 1)
