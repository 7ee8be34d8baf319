"""Two stages, looked at from inside: python traps_worker.py FOLDER.

Each rank writes what it saw to FOLDER/RANK.json, by name of the optimizer in use.
"""

import gc
import json
import os
import sys
from pathlib import Path

import deepspeed
import torch

from infini_ds.parallel.build import build_engine, start_distributed
from infini_ds.parallel.deepspeed.gradient_sums import gradient_of
from infini_ds.parallel.engine import StepSize
from infini_ds.parallel.pipeline.engine import InfiniEngine
from tests.distributed.layout_worker import config_of, cut, windows_of

KINDS = {
    "fp32_zero0": ("fp32", 0),
    "fp32_zero1": ("fp32", 1),
    "bf16_zero0": ("bf16", 0),
    "bf16_zero1": ("bf16", 1),
}
CHUNKS = 2


def step(engine: InfiniEngine, number: int) -> None:
    windows, count = windows_of(number)
    size = StepSize(count, count)
    engine.train_step(lambda micro_batch: cut(windows, engine.lanes_of(micro_batch)), size, 1.0)


def weights(engine: InfiniEngine) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in engine.module.parameters()]


def changed(engine: InfiniEngine, before: list[torch.Tensor]) -> bool:
    pairs = zip(before, engine.module.parameters(), strict=True)
    return any(not torch.equal(old, new) for old, new in pairs)


def look(dtype: str, zero_stage: int) -> dict:
    config = config_of(
        {
            "parallel.pipeline_stages": 2,
            "parallel.zero_stage": zero_stage,
            "train.dtype": dtype,
            "train.chunks": CHUNKS,
            "train.activation_checkpointing": "block",
            "optimizer.gate_learning_rate_multiplier": 0.0,
            "model.memory": {"write_gate": True, "write_penalty": 0.1, "short_conv": True},
        }
    )
    engine = build_engine(config)
    seen: dict = {"groups": [group["name"] for group in engine.optimizer.param_groups]}

    calls = []
    weight = engine.module.blocks[0].mlp.down_proj.weight
    counter = weight.register_hook(lambda _: calls.append(1))
    sums = engine._exec_reduce_grads

    def reduce_and_note():
        seen["sum_dtype"] = str(gradient_of(weight).dtype)
        sums()

    engine._exec_reduce_grads = reduce_and_note
    gate = engine.module.blocks[0].self_attn.beta
    gate_before, before = gate.detach().clone(), weights(engine)
    step(engine, 0)
    counter.remove()
    seen["backward_passes"] = len(calls)
    seen["units"] = engine.micro_batches * CHUNKS
    seen["moved"] = changed(engine, before)
    seen["gate_moved"] = not torch.equal(gate, gate_before)
    # A step whose gradient is not finite on one rank alone.
    factor = float("inf") if engine.is_last_stage() else 1.0
    hook = weight.register_hook(lambda gradient: gradient * factor)
    before = weights(engine)
    step(engine, 1)
    hook.remove()
    seen["moved_when_not_finite"] = changed(engine, before)
    seen["skipped"] = [engine.skipped_steps, engine.skipped_in_a_row]
    seen["norm_when_not_finite"] = str(engine.gradient_norm)
    step(engine, 2)
    seen["moved_afterwards"] = changed(engine, before)
    seen["skipped_afterwards"] = [engine.skipped_steps, engine.skipped_in_a_row]
    return seen


def main() -> None:
    torch.set_num_threads(1)
    start_distributed(60)
    seen: dict = {}
    for kind, settings in KINDS.items():
        seen[kind] = look(*settings)
        gc.collect()  # before another engine is built, see layout_worker.py
    seen["compiled"] = sorted(os.listdir(os.environ["TORCH_EXTENSIONS_DIR"]))
    seen["compiles_communication"] = deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"]
    rank = torch.distributed.get_rank()
    (Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
