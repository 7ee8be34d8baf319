"""The compute type of a run whose config leaves it to the devices."""

from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from deepspeed.accelerator import get_accelerator

from infini_ds.config import RunConfig


def with_dtype(config: RunConfig, found: Path | None) -> RunConfig:
    """The config with train.dtype resolved, where it is `auto`; on all ranks together.

    Args:
        found: the checkpoint that the run goes on from, whose type is kept.
    """
    if config.train.dtype != "auto":
        return config
    if found:
        dtype = yaml.safe_load((found / "config.yaml").read_text())["train"]["dtype"]
    else:
        device = torch.device(get_accelerator().current_device_name())
        native = torch.tensor(float(computes_bf16(device)), device=device)
        dist.all_reduce(native, dist.ReduceOp.MIN)
        dtype = "bf16" if native else "fp32"
    return config.model_copy(update={"train": config.train.model_copy(update={"dtype": dtype})})


def computes_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16; without, it is many times slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
