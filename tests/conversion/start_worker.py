"""One rank that starts from exports in one layout after another, and writes what came out.

    python start_worker.py CASES.json FOLDER

A case is an export and overrides: {"init_from": "...", "train.dtype": "bf16"}.
"""

import gc
import json
import sys
from pathlib import Path

import torch
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import safe_get_full_fp32_param

from infini_ds.config import RunConfig
from infini_ds.data.windows import Windows
from infini_ds.parallel.build import build_engine, start_distributed
from infini_ds.parallel.engine import StepSize
from infini_ds.runs.export import open_model
from infini_ds.training.start import load_start
from tests import tiny
from tests.distributed.layout_worker import LANES, SEGMENTS, STEPS, cut, windows_of


def config_of(case: dict) -> RunConfig:
    """A run with the export's model."""
    export = open_model(Path(case["init_from"]))
    return tiny.run_config(
        model=export.config.model_dump(),
        data={"packing": False},
        train={
            "steps": STEPS, "batch_size": LANES, "window_segments": SEGMENTS, "dtype": "fp32",
            "timeout": 600.0,
        },
        optimizer={"learning_rate": 1e-3, "eps": 1e-5, "warmup_steps": 2},
        **{name.replace(".", "__"): value for name, value in case.items() if "." in name},
    )  # fmt: skip


def start(case: dict) -> dict:
    """The losses of STEPS steps, and in what the optimizer's fp32 weights were not the export's."""
    config = config_of(case)
    weights = open_model(Path(case["init_from"])).weights
    engine = build_engine(config)
    load_start(engine, weights)
    wrong = []
    for name, parameter in engine.own_parameters():
        expected = weights.read(name)
        kept = safe_get_full_fp32_param(parameter)
        kept = parameter.detach() if kept is None else kept
        same = torch.equal(kept.view_as(expected), expected)
        with GatheredParameters([parameter], enabled=config.parallel.zero_stage == 3):
            same &= torch.equal(parameter.detach(), expected.to(parameter.dtype))
        if not same:
            wrong.append(name)
    losses = []
    for step in range(STEPS if config.train.dtype == "fp32" else 0):
        windows, count = windows_of(step)

        def read(micro_batch: int, windows: Windows = windows) -> Windows:
            return cut(windows, engine.lanes_of(micro_batch))

        done = engine.train_step(read, StepSize(count, count), 1.0)
        losses.append(done.loss_sum / count)
    return {"wrong": wrong, "losses": losses, "stage": engine.stage_id}


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    start_distributed(600)
    rank = torch.distributed.get_rank()
    for name, case in cases.items():
        (folder / f"{name}.{rank}.json").write_text(json.dumps(start(case)))
        gc.collect()  # before another engine is built, see layout_worker.py
    torch.distributed.destroy_process_group()
