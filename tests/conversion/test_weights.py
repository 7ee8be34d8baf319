"""What is read from files of weights, and what is refused in one line."""

import json

import pytest
import torch
from safetensors.torch import save_file

from infini_ds import cli
from infini_ds.errors import UserError
from infini_ds.runs.weights import PickledWeights, SafetensorsWeights


def write_index(folder, weight_map) -> None:
    tree = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(tree)


def test_a_tensor_is_taken_from_the_file_that_the_index_names(tmp_path):
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "1.safetensors")
    save_file({"a": torch.zeros(3), "c": torch.ones(2)}, tmp_path / "2.safetensors")
    write_index(tmp_path, {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"})
    weights = SafetensorsWeights(tmp_path)
    assert weights.metas.keys() == {"a", "b", "c"}
    assert weights.read("a").tolist() == [1, 1]
    write_index(tmp_path, {"a": "2.safetensors"})
    weights = SafetensorsWeights(tmp_path)
    assert weights.metas.keys() == {"a"}
    assert weights.read("a").tolist() == [0, 0, 0]
    write_index(tmp_path, {"b": "2.safetensors"})
    with pytest.raises(UserError, match=r"2.safetensors: has no tensor b, which model.safe"):
        SafetensorsWeights(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        '{"weight_map": {"a": 1, "b": "x"}}', '{"weight_map": {"a": ["x"]}}', '{"weight_map": 3}',
        '{"weight_map": {"a": "../x"}}', "[" * 100_000, '{"weight_map": null}', "\udcff",
    ],
)  # fmt: skip
def test_broken_index_is_named(text, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"index.json: (cannot be read|.* must be the name of a)"):
        SafetensorsWeights(tmp_path)


TENSORS = {
    "sparse_coo": lambda: torch.eye(2).to_sparse(),
    "meta": lambda: torch.empty(2, device="meta"),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore")  # some kinds are going to be removed from PyTorch
@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_are_no_plain_numbers_are_named(kind, tmp_path):
    torch.save({"weight": TENSORS[kind]()}, tmp_path / "state.pt")
    with pytest.raises(UserError, match=rf"must be plain numbers, not {kind}"):
        PickledWeights(tmp_path / "state.pt")


def test_parameters_are_read_as_numbers(tmp_path):
    torch.save({"weight": torch.nn.Parameter(torch.ones(2))}, tmp_path / "state.pt")
    assert not PickledWeights(tmp_path / "state.pt").read("weight").requires_grad


SHAPES = {
    "token_emb.weight": (64, 48), "layers.0.0.fastweight_mem.head_gates": (4,),
    "layers.0.0.to_qkv.weight": (192, 48), "layers.0.1.proj_out.weight": (48, 128),
}  # fmt: skip
WRONG = [
    ("token_emb.weight", (64,)), ("token_emb.weight", (0, 48)),
    ("layers.0.0.fastweight_mem.head_gates", ()), ("layers.0.0.fastweight_mem.head_gates", (0,)),
    ("layers.0.0.to_qkv.weight", (180, 48)), ("layers.0.0.to_qkv.weight", (2, 48)),
    ("layers.0.1.proj_out.weight", (48,)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "shape"), WRONG)
def test_wrong_shapes_of_the_seed_library_are_named(name, shape, tmp_path, capsys):
    state = {each: torch.zeros(size) for each, size in (SHAPES | {name: shape}).items()}
    torch.save(state, tmp_path / "seed.pt")
    command = ["convert", "from-seed", str(tmp_path / "seed.pt"), str(tmp_path / "export")]
    assert cli.main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"seed.pt: tensor {name} has" in line
