"""Chooses the compute type of a run whose config leaves it to the devices."""

from pathlib import Path

import torch
import yaml
from deepspeed.accelerator import get_accelerator

from infini_ds.config import RunConfig
from infini_ds.parallel.ranks import gathered
from infini_ds.system.compute_type import ComputeType, fastest_type


def with_dtype(config: RunConfig, found: Path | None) -> tuple[RunConfig, str]:
    """Resolves train.dtype if it is `auto`, and says why; must be called on all ranks together.

    Args:
        found: the checkpoint that the run resumes from, whose type is kept.
    """
    if config.train.dtype != "auto":
        return config, "as train.dtype asks"
    if found:
        dtype = yaml.safe_load((found / "config.yaml").read_text())["train"]["dtype"]
        why = "as the run began"
    else:
        dtype, why = _fastest_of_all()
    train = config.train.model_copy(update={"dtype": dtype})
    return config.model_copy(update={"train": train}), why


def _fastest_of_all() -> ComputeType:
    """Returns bf16 if it is faster on every rank, else fp32."""
    mine = fastest_type(torch.device(get_accelerator().current_device_name()))
    told = gathered(mine)
    for rank, each in enumerate(told):
        if each.dtype == "fp32":
            where = f" (rank {rank})" if told[0].dtype == "bf16" else ""
            return ComputeType("fp32", each.why + where)
    return told[0]
