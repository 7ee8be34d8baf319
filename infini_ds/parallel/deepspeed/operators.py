"""DeepSpeed's operators for offloading, the only ones that are compiled at the first start."""

import contextlib
import fcntl
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder
from deepspeed.ops.op_builder.builder import OpBuilder
from torch.utils import cpp_extension

from infini_ds.errors import UserError
from infini_ds.system.causes import cause, one_line, shortened
from infini_ds.system.cpp_compiler import why_no_cpp


def leave_out_shared_memory_communication() -> None:
    """Keeps DeepSpeed from compiling an operator at the first start that only inference uses.

    That takes a minute and is guarded by a lock that a killed process never releases.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def build_cpu_adam() -> None:
    """Compiles the operator, unless that is done already, and loads it into this process.

    Raises:
        UserError: it cannot be compiled here; the message says what is missing.
    """
    _build(CPUAdamBuilder(), "parallel.offload_optimizer: DeepSpeed's CPU Adam")


def build_async_io() -> None:
    """Does so with the operator that reads and writes weights on a disk.

    Raises:
        UserError: it cannot be compiled here; the message says what is missing.
    """
    what = "parallel.nvme_path: DeepSpeed's operator for disks"
    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise UserError(
            f"{what} cannot be compiled, as there is no libaio with its headers (apt-get install "
            "libaio-dev)"
        )
    _build(AsyncIOBuilder(), what)


def _build(builder: OpBuilder, what: str) -> None:
    # pip installs ninja beside the interpreter, even where the environment is not activated.
    if not shutil.which("ninja"):
        own = str(Path(sys.executable).parent)
        os.environ["PATH"] = os.pathsep.join(filter(None, (os.environ.get("PATH"), own)))
    try:
        directory = Path(cpp_extension._get_build_directory(builder.NAME, False))
        with _only_one(directory):
            builder.load(verbose=False)
    except (OSError, RuntimeError, ImportError) as error:
        raise UserError(f"{what} cannot be compiled, {_reason(error)}") from None


class CpuAdam(DeepSpeedCPUAdam):
    """AdamW in the host's memory, whose update depends on the step's number alone.

    DeepSpeed's multiplies powers of the betas from step to step, and computes them anew after a
    start, which is not the same number. So a resumed run would differ in the last digits.
    """

    def step(self, closure=None):
        """Updates the weights."""
        nothing = torch.empty(0)
        # A step that does not follow the last one makes it compute the powers.
        self.ds_opt_adam.adam_update(
            self.opt_id, 0, 0.0, *self.defaults["betas"], self.defaults["eps"], 0.0, True,
            nothing, nothing, nothing, nothing,
        )  # fmt: skip
        return super().step(closure)


@contextlib.contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    """Waits for other processes that compile in the same directory.

    PyTorch's own lock is a file: if a killed process leaves it behind, all others wait forever.
    Whoever holds this lock may remove that file.
    """
    with open(directory / ".infini_ds.lock", "w") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
            (directory / "lock").unlink(missing_ok=True)
        yield


def _reason(error: Exception) -> str:
    compiler = shlex.split(cpp_extension.get_cxx_compiler())[0]
    if not shutil.which("ninja"):
        return "as there is no ninja (pip install ninja)"
    if missing := why_no_cpp(compiler):
        return missing
    if isinstance(error, OSError):
        return (
            f"as its directory cannot be written ({one_line(error)}); set the variable "
            "TORCH_EXTENSIONS_DIR to a directory of yours, on a disk of each machine"
        )
    lines = re.findall(r"^.*\berror: .*$", str(error), re.MULTILINE)
    return cause(error) or (one_line(lines[0]) if lines else shortened(one_line(error)))
