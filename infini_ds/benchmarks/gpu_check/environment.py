"""Records what is on the machine."""

import os
import shutil
import subprocess
import sys

import torch
from torch.cuda import nccl

from infini_ds.benchmarks.gpu_check.results import Part

TOOLS = (
    "date", "nvidia-smi", "nvcc --version", "df -h /tmp /dev/shm", "ip -br addr",
    "which gcc cuobjdump compute-sanitizer",
)  # fmt: skip
LIBRARIES = ("numpy", "einops", "transformers", "datasets", "pydantic")


def env(part: Part) -> None:
    """Records versions and the card, and checks that the card computes at all."""
    for tool in TOOLS:
        if shutil.which(tool.split()[0]):
            subprocess.run(tool.split(), stderr=subprocess.STDOUT, check=False, timeout=20)
    import deepspeed
    import triton
    from triton import knobs

    import infini_ds.training.trainer  # noqa: F401  (imports everything that a run needs)

    part.note(
        "env", python=sys.version.split()[0], torch=torch.__version__, triton=triton.__version__,
        deepspeed=deepspeed.__version__, cores=os.cpu_count(),
        **{name: __import__(name).__version__ for name in LIBRARIES},
    )  # fmt: skip
    part.note("env", ptxas=knobs.nvidia.ptxas.path, ptxas_version=knobs.nvidia.ptxas.version)
    if part.tiny:
        return
    card = torch.cuda.get_device_properties(0)
    part.note(
        "env", card=card.name, memory_gib=card.total_memory / 2**30,
        capability=torch.cuda.get_device_capability(), nccl=nccl.version(),
        cudnn=torch.backends.cudnn.version(), tf32=torch.backends.cuda.matmul.allow_tf32,
    )  # fmt: skip
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    part.note("env", product_is_finite=bool((x @ x).isfinite().all()))
