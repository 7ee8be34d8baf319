"""Runs models on a device that is not there, and prints what touched the host, as JSON.

Tensors have no data, so that whatever would wait for the device fails; a process of its own,
since a device type stays registered.

Usage: python -m tests.model.absent_device_worker LIBRARY < CASES
"""

import contextlib
import ctypes
import json
import sys
import types

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from infini_ds import InfiniTransformer, ModelConfig
from infini_ds.kernels.launch import HOPPER, recording

DEVICE = "absent:0"


class HostTensors(TorchDispatchMode):
    """Notes the operators that take or make a tensor on the host.

    One without elements costs nothing: torch 2.11 makes such a one for each checkpoint.
    """

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        if any(x.device.type == "cpu" and x.numel() for x in tensors):
            self.names.append(str(func))
        return out


def run(case: dict) -> dict[str, list[str]]:
    """The operators that touched the host, by what was done, the second time that it was done."""
    device = torch.device(DEVICE)
    kernels = recording(HOPPER) if case["kernels"] else contextlib.nullcontext()
    with FakeTensorMode(), kernels:
        torch.set_default_dtype(torch.bfloat16)  # made so: without data nothing is converted
        with device:
            model = InfiniTransformer(ModelConfig(**case["config"]), 0, case["checkpointing"])
        torch.set_default_dtype(torch.float32)
        tokens = torch.zeros(2, 3 * model.config.segment_length + 1, dtype=torch.int64).to(device)
        found = {}
        for _ in range(2):
            with HostTensors() as host:
                model.loss(tokens, chunk_tokens=64).backward()
            found["training"] = host.names
            with HostTensors() as host, torch.no_grad():
                memory = model(tokens[:, :-1]).memory
            found["reading"] = host.names
            with HostTensors() as host, torch.no_grad():
                model(tokens[:, :1], memory=memory)
            found["a_token"] = host.names
        devices = {parameter.grad.device for parameter in model.parameters()}
        assert devices == {device}, devices
    return found


def main() -> None:
    ctypes.CDLL(sys.argv[1])
    module = types.ModuleType("torch.absent")
    module.is_available = lambda: False  # type: ignore[attr-defined]
    module.current_device = lambda: 0  # type: ignore[attr-defined]
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]  # type: ignore[attr-defined]
    torch._register_device_module("absent", module)
    json.dump([run(case) for case in json.load(sys.stdin)], sys.stdout)


if __name__ == "__main__":
    main()
