"""Saves checkpoints with the engine, and the logits that the engine's own model gives.

    python run_worker.py CONFIG.yaml ...

Beside each config, for its output_dir: FOLDER/reference.safetensors with tokens and logits.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from infini_ds import config as configuration
from infini_ds.memory import MemoryState
from infini_ds.model.memory import Memory
from infini_ds.model.transformer import full_layout
from infini_ds.parallel.build import build_engine, start_distributed
from infini_ds.training import checkpoint


def main(*paths: str) -> None:
    start_distributed(60)
    for path in paths:
        config = configuration.load(path)
        engine = build_engine(config)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in engine.module.parameters():
                drawn = torch.empty(parameter.shape).normal_(0, 0.2, generator=generator)
                parameter.copy_(drawn)
        model = config.model
        tokens = torch.randint(256, (2, 3 * model.segment_length), generator=generator)
        dtype = next(engine.module.parameters()).dtype
        empty: list[MemoryState] = Memory.empty(model, 2, "cpu", dtype).layers()
        layout = full_layout(2, 3, model.segment_length, tokens.device)
        with torch.no_grad():
            hidden, _, _ = engine.module(tokens, layout, empty)
            logits = engine.module.logits(hidden)
        save_file(
            {"tokens": tokens, "logits": logits}, Path(path).with_name("reference.safetensors")
        )
        for step in (1, 2):
            state = {"step": step, "tokens": 0, "skipped_steps": 0, "store": "none"}
            checkpoint.save(engine, config, state, lambda done: None)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
