"""One rank of a layout: trains a few steps and writes what came out.

    python layout_worker.py CASES.json FOLDER

A case is a dict of overrides such as {"parallel.zero_stage": 1}.
"""

import gc
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed import distributed_c10d

from infini_ds.config import RunConfig
from infini_ds.data.windows import Windows
from infini_ds.layout import IGNORE_INDEX, Layout
from infini_ds.model.optimizer import learning_rate_factor, write_penalty_factor
from tests import tiny

STEPS = 5
LANES = 4
SEGMENTS = 4
LENGTH = 8
VOCABULARY = 61
PROMPT = [1, 2, 3]


def spread_write_gates(patch: pytest.MonkeyPatch) -> None:
    """Initial write weights from 0 to 1, both ends included, instead of about 0.5."""
    patch.setattr("infini_ds.model.layers.INITIAL_DEVIATION", 0.6)


def config_of(case: dict) -> RunConfig:
    """A model just large enough for four stages, whose predictions are spread out."""
    return tiny.run_config(
        seed=3,
        model={
            "vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 4, "num_heads": 4,
            "segment_length": LENGTH, "initializer_range": 0.2, "gate_init": 0.5,
        },
        data={"packing": False},
        train={
            "steps": 20, "batch_size": LANES, "window_segments": SEGMENTS, "dtype": "fp32",
            "loss_chunk_tokens": 13, "timeout": 60.0,
        },
        optimizer={
            "learning_rate": 1e-3, "eps": 1e-5, "warmup_steps": 2, "gradient_clipping": 0.5,
            "gate_learning_rate_multiplier": 3.0,
        },
        **{name.replace(".", "__"): value for name, value in case.items()},
    )  # fmt: skip


def windows_of(step: int, config: RunConfig | None = None) -> tuple[Windows, int]:
    """Windows of all lanes, with padding and documents that start inside, and their tokens.

    If they are packed, free ends hold whole documents of two tokens and of one.
    """
    config = config or config_of({})
    segments, packed = config.train.window_segments, config.packed
    # Longer windows of the first seeds have a step of which a change of the weights by 1e-7 changes
    # the norm by 1e-5, also on one process.
    first = 0 if segments == SEGMENTS else 100
    generator = torch.Generator().manual_seed(first + step)
    shape = (LANES, segments)
    tokens = torch.randint(VOCABULARY, (LANES, segments * LENGTH), generator=generator)
    labels = torch.randint(VOCABULARY, tokens.shape, generator=generator)
    starts = torch.rand(shape, generator=generator) < 0.2
    if step == 0:
        starts[:, 0] = True
    short = torch.rand(shape, generator=generator) < 0.3
    lengths = torch.randint(1, LENGTH + 1, shape, generator=generator)
    lengths = torch.where(short, lengths, LENGTH).int()
    positions = torch.arange(LENGTH, dtype=torch.int32)
    valid = positions < lengths[..., None]
    layout = Layout(starts, lengths)
    if packed:
        behind = positions - lengths[..., None]
        valid = behind < 3
        begins = torch.where(behind < 2, lengths[..., None], lengths[..., None] + 2)
        begins = torch.where(behind < 0, 0, begins).masked_fill(~valid, LENGTH)
        layout = Layout(starts, lengths, begins.int())
    valid = valid.reshape(tokens.shape)
    labels = labels.masked_fill(~valid, IGNORE_INDEX)
    return Windows(tokens, labels, layout, valid.float()), int(valid.sum())


def cut(windows: Windows, lanes: range) -> Windows:
    """Some lanes of a batch of windows."""
    part = slice(lanes.start, lanes.stop)
    layout = windows.layout.map(lambda tensor: tensor[part])
    return Windows(windows.tokens[part], windows.labels[part], layout, windows.weights[part])


def state_names(module) -> list[str]:
    """The names of a stage's state in InfiniTransformer. What is behind the blocks of a sharded
    model is there twice, once in `output`."""
    from infini_ds.parallel.deepspeed.module import single_process_name

    names = [name for name in module.state_dict() if not name.startswith("output.")]
    return sorted(
        name if name.startswith("layers.") else single_process_name(name) for name in names
    )


def whole_weights(engine) -> dict[str, torch.Tensor]:
    """Copies of this rank's parameters by their names in InfiniTransformer."""
    with engine.whole(engine.module):
        return {name: weight.detach().clone() for name, weight in engine.own_parameters()}


def train(config: RunConfig) -> dict:
    """STEPS steps on this rank."""
    from infini_ds.parallel.build import build_engine
    from infini_ds.parallel.deepspeed.gradient_sums import gradient_of
    from infini_ds.parallel.engine import StepSize

    engine = build_engine(config)
    result: dict = {
        "optimizer": type(engine.optimizer).__name__,
        "stage": engine.stage_id,
        "state_names": state_names(engine.module),
        "initial": whole_weights(engine),
        "losses": [],
        "norms": [],
        "writes": [],
        "unrounded": [],
    }
    reduce = engine.reduce_gradients

    def reduce_and_look() -> None:
        reduce()
        sums = torch.cat([gradient_of(p).flatten() for p in engine.trained_parameters()])
        result["unrounded"].append(float((sums != sums.bfloat16().float()).float().mean()))

    if result["optimizer"] == "BF16_Optimizer":
        engine.reduce_gradients = reduce_and_look
    for step in range(STEPS):
        windows, count = windows_of(step, config)

        def read(micro_batch: int, windows: Windows = windows) -> Windows:
            return cut(windows, engine.lanes_of(micro_batch))

        rate = learning_rate_factor(step, config.train.steps, config.optimizer)
        penalty = write_penalty_factor(step, config.optimizer)
        done = engine.train_step(read, StepSize(count, count), rate, penalty)
        result["losses"].append(done.loss_sum / count)
        result["norms"].append(done.gradient_norm)
        result["writes"].append(engine.written())
    result["weights"] = whole_weights(engine)
    result["memories"] = {
        block: engine.memories.stacked(block).named() for block in engine.memories.blocks
    }
    result["limits"] = sorted(limits_of_groups())
    result["exchanged_bytes"] = engine.exchanged_bytes
    result["sent_bytes"], result["step_bytes"] = engine.sent_bytes, engine.step_bytes()
    if config.model.memory.write_gate:
        result["text"] = engine.generate(PROMPT, 20, 0.0, 0)
    result["first_lane"] = engine.lanes_of(0).start
    return result


def limits_of_groups() -> set[float]:
    """Seconds that this rank would wait in each of its process groups."""
    return {
        group._get_backend(torch.device("cpu")).options._timeout.total_seconds()  # type: ignore[attr-defined]
        for group in distributed_c10d._world.pg_map
        if not distributed_c10d._rank_not_in_group(group)
    }


def main() -> None:
    from infini_ds.parallel.build import start_distributed

    torch.set_num_threads(1)
    spread_write_gates(pytest.MonkeyPatch())
    cases, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    start_distributed(60)
    rank = torch.distributed.get_rank()
    for name, case in cases.items():
        torch.save(train(config_of(case)), folder / f"{name}.{rank}.pt")
        # An engine that is found to be garbage during an import makes an import itself, which
        # Python 3.11 does not always survive (KeyError in importlib).
        gc.collect()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
