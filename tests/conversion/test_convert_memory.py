"""A conversion needs the memory of a few tensors, whatever the size of the model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from infini_ds.config import ModelConfig
from infini_ds.conversion import llama
from infini_ds.conversion.export import parameters_of

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


def test_peak_is_below_a_layer_and_a_shard(tmp_path):
    layer = make_plain(tmp_path / "plain")
    make_plain(tmp_path / "tiny", num_hidden_layers=1, hidden_size=64)
    done = subprocess.run(
        [sys.executable, str(WORKER), str(tmp_path)], capture_output=True, text=True, check=True,
        # Or the C library keeps freed memory for later.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    peak = int(done.stdout.split("peak ")[1])
    model, shard = LAYERS * layer, 16_000_000
    print(f"peak {peak / 1e6:.0f} MB, layer {layer / 1e6:.0f} MB, model {model / 1e6:.0f} MB")
    assert model > 5 * (layer + shard)
    assert peak < layer + shard
