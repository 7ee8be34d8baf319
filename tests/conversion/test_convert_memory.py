"""A conversion needs the memory of a few tensors, whatever the size of the model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deepspeed.utils.tensor_fragment import fragment_address
from safetensors.torch import save_file

from infini_ds import config as configuration
from infini_ds.config import ModelConfig
from infini_ds.conversion import llama
from infini_ds.runs import manifest
from infini_ds.runs.export import parameters_of
from infini_ds.system.whole_file import sha256_of
from tests.tiny_run import tiny_config

WORKER = Path(__file__).with_name("memory_worker.py")
LAYERS = 16
CONFIG = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 512, "intermediate_size": 1536,
    "num_hidden_layers": LAYERS, "num_attention_heads": 8, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
}  # fmt: skip


def make_plain(directory: Path, **settings) -> int:
    """Saves a checkpoint, a file a layer; bytes of a layer."""
    directory.mkdir()
    path = directory / "config.json"
    path.write_text(json.dumps(CONFIG | settings))
    config: ModelConfig = llama.from_config(CONFIG | settings, path, 32, -4.0, "linear")
    shapes, files = parameters_of(config), {}
    for pair in llama.table(config):
        file = f"{pair.ours.split('.')[1]}.safetensors"
        for name, meta in zip(pair.theirs, pair.split(shapes[pair.ours]), strict=True):
            files.setdefault(file, {})[name] = torch.full(meta.shape, 1.0)
    for file, tensors in files.items():
        save_file(tensors, directory / file)
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return sum(tensor.nbytes for tensor in files["1.safetensors"].values())


def make_run(directory: Path, layers: int, hidden_size: int) -> int:
    """Saves a checkpoint of a bf16 run; bytes of a layer in fp32."""
    config = tiny_config(
        directory, num_layers=layers, hidden_size=hidden_size, num_heads=8, head_dim=64,
        intermediate_size=1536,
    )  # fmt: skip
    train = config.train.model_copy(update={"dtype": "bf16"})
    config = config.model_copy(update={"train": train})
    checkpoint = directory / "step_00000001"
    checkpoint.mkdir(parents=True)
    by_layer: dict[int, dict[str, torch.Tensor]] = {}
    places, end = {}, 0
    for name, meta in parameters_of(config.model).items():
        _, index, inner = name.split(".", 2)
        by_layer.setdefault(int(index), {})[inner] = torch.ones(meta.shape, dtype=torch.bfloat16)
        places[f"{index}.{inner}"] = fragment_address(numel=meta.numel(), start=end)
        end += meta.numel()
    for index, state in by_layer.items():
        torch.save(state, checkpoint / f"layer_{index:02d}-model_states.pt")
    state = {"single_partition_of_fp32_groups": [torch.ones(end)], "param_slice_mappings": [places]}
    file = checkpoint / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": state}, file)
    (checkpoint / "config.yaml").write_text(configuration.dump(config))
    (checkpoint / "state.json").write_text('{"step": 1, "tokens": 9}')
    files = {
        name: {"size": (checkpoint / name).stat().st_size, "sha256": sha256_of(checkpoint / name)}
        for name in manifest.files_of(checkpoint)
    }
    manifest.write(checkpoint, files)
    return 4 * sum(tensor.numel() for tensor in by_layer[1].values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "bf16", "fp32"])
def test_peak_is_below_a_layer_and_a_shard(kind, tmp_path):
    if kind == "llama":
        layer = make_plain(tmp_path / "plain")
        make_plain(tmp_path / "tiny", num_hidden_layers=1, hidden_size=64)
    else:
        layer = make_run(tmp_path / "plain", LAYERS, 512)
        make_run(tmp_path / "tiny", 1, 64)
    done = subprocess.run(
        [sys.executable, str(WORKER), str(tmp_path), kind], capture_output=True, text=True,
        # Or the C library keeps freed memory for later.
        check=True, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    peak = int(done.stdout.split("peak ")[1])
    model, shard = LAYERS * layer, 16_000_000
    print(f"peak {peak / 1e6:.0f} MB, layer {layer / 1e6:.0f} MB, model {model / 1e6:.0f} MB")
    assert model > 5 * (layer + shard)
    assert peak < layer + shard
