"""Checkpoints of tiny models that no training made: what load_run reads, and a little more."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from infini_ds import config as configuration
from infini_ds.config import RunConfig
from infini_ds.model.transformer import InfiniTransformer
from infini_ds.runs import manifest
from infini_ds.runs.tokenizer import copy_kept_tokenizer
from infini_ds.system.whole_file import sha256_of
from tests import tiny


def tiny_config(folder: Path, **model) -> RunConfig:
    """Bytes, two layers, segments of 32, in a run at `folder`."""
    return tiny.run_config(
        output_dir=str(folder),
        model={"vocab_size": 258, "segment_length": 32, "initializer_range": 0.5, **model},
        data={"store": str(folder / "store"), "tokenizer": {"kind": "bytes"}},
        train={"steps": 9, "batch_size": 2, "dtype": "fp32"},
    )


def write_checkpoint(
    config: RunConfig, step: int = 9, seed: int = 0, store: str = "none", **told
) -> InfiniTransformer:
    """Writes the initial model of a seed as the checkpoint of a step; the model.

    Args:
        store: fingerprint of the one that it was trained on.
        told: what else its state says.
    """
    model = InfiniTransformer(config.model, seed).eval()
    directory = Path(config.output_dir) / "checkpoints" / f"step_{step:08d}"
    (directory / "memory").mkdir(parents=True)
    for index, layer in enumerate(model.layers):
        if next(layer.parameters(), None) is not None:
            torch.save(layer.state_dict(), directory / f"layer_{index:02d}-model_states.pt")
    save_file({"norm": torch.zeros(3)}, directory / "memory" / "block_000.lanes_00000.safetensors")
    (directory / "rank_0_optim_states.pt").write_bytes(b"optimizer" * 9)
    copy_kept_tokenizer(Path(config.output_dir), directory)
    (directory / "config.yaml").write_text(configuration.dump(config))
    state = {
        "step": step, "tokens": 100 * step, "skipped_steps": 0,
        "layout": {"pipeline": 2, "data": 1}, "store": store, **told,
    }  # fmt: skip
    (directory / "state.json").write_text(json.dumps(state))
    write_manifest(directory)
    return model


def write_manifest(checkpoint: Path) -> None:
    """Of a checkpoint whose files a test has changed."""
    files = {
        name: {
            "size": (checkpoint / name).stat().st_size,
            "sha256": sha256_of(checkpoint / name),
        }
        for name in manifest.files_of(checkpoint)
    }
    manifest.write(checkpoint, files)
