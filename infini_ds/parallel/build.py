"""Builds the engine of a run on this process: the only place that starts DeepSpeed."""

import contextlib
import io
import os
import socket
from collections.abc import Callable
from datetime import timedelta

from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger
from torch.distributed import DistError

from infini_ds.config import RunConfig
from infini_ds.errors import RunError, UserError
from infini_ds.kernels.backend import use_backend
from infini_ds.parallel.deepspeed.config import deepspeed_config
from infini_ds.parallel.deepspeed.operators import leave_out_shared_memory_communication
from infini_ds.parallel.engines import pipelined, sharded
from infini_ds.parallel.pipeline.engine import InfiniEngine
from infini_ds.system.causes import cause, one_line, shortened
from infini_ds.system.network import check_address, check_interfaces, name_interface


def start_distributed(timeout: float) -> None:
    """Joins the processes that the launcher started; a process started alone is a world of one.

    Args:
        timeout: how long any rank waits for another, in seconds.

    Raises:
        UserError: they cannot meet where they are told to.
        RunError: not all of them came.
    """
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        os.environ.setdefault(name, value)
    # A single process meets nobody, so it ignores an address left over from another run. (Under
    # torchrun, the address belongs to torchrun's own store.)
    if os.environ["WORLD_SIZE"] == "1" and "TORCHELASTIC_RUN_ID" not in os.environ:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    check_address()
    name_interface()
    check_interfaces(get_accelerator().communication_backend_name())
    # Each channel and group needs a hardware queue of its own: those that share one wait for each
    # other.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    logger.setLevel("WARNING")
    _check_device(int(os.environ["LOCAL_RANK"]))
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    leave_out_shared_memory_communication()
    try:
        comm.init_distributed(
            dist_backend=get_accelerator().communication_backend_name(),
            timeout=timedelta(seconds=timeout),
            verbose=False,
        )
    except (DistError, RuntimeError, ValueError) as error:
        raise _not_started(error, timeout) from None


def _check_device(local_rank: int) -> None:
    """Checks that this process has a device; on a CPU it always has one.

    Raises:
        UserError: there is none.
    """
    accelerator = get_accelerator()
    name = accelerator.device_name()
    devices = accelerator.device_count() if accelerator.is_available() else 0
    if name != "cpu" and local_rank >= devices:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        which = "CUDA_VISIBLE_DEVICES is not set" if visible is None else (
            f"CUDA_VISIBLE_DEVICES={visible!r}"
        )  # fmt: skip
        raise UserError(
            f"process {local_rank} of {socket.gethostname()} has no {name} device: PyTorch sees "
            f"{devices} there ({which}); start fewer processes, or set DS_ACCELERATOR=cpu"
        )


def _not_started(error: Exception, timeout: float) -> UserError | RunError:
    """Says in one line why the processes did not meet."""
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if "EADDRINUSE" in str(error) or "address already in use" in str(error):
        return UserError(
            f"port {port} is in use on this machine, most often by another run: name another one, "
            "deepspeed --master_port PORT (bash launch/pretrain.sh --deepspeed '--master_port "
            "PORT'), torchrun --master-port PORT, or the variable MASTER_PORT"
        )
    said = cause(error) or shortened(one_line(error))
    world = f"the {os.environ['WORLD_SIZE']} processes"
    if "imed out" in said or "timeout" in said:
        return RunError(
            f"{world} did not find each other within train.timeout = {timeout:g} s at {address} "
            f"port {port}: {said}"
        )
    if isinstance(error, ValueError):  # PyTorch could not use a variable that it reads
        return UserError(f"{world} cannot meet: {said}")
    return RunError(f"{world} did not find each other at {address} port {port}: {said}")


def build_engine(
    config: RunConfig,
    universal: bool = False,
    on_progress: Callable[[str], None] = lambda done: None,
) -> InfiniEngine:
    """Builds this process's engine with initial weights; model.vocab_size must be set.

    Args:
        universal: whether a checkpoint in DeepSpeed's universal form will be loaded.
        on_progress: called with a description of each piece of work when it is done.

    Raises:
        UserError: the processes do not fit the config.
    """
    use_backend(config.kernels.backend)
    world = comm.get_world_size()
    stages = config.parallel.resolve_stages(world, config.model.num_layers)
    data = config.data_parallel_size(world)
    # DeepSpeed prints a line for each layer; a real stream takes them, because building an operator
    # flushes it.
    with contextlib.redirect_stdout(io.StringIO()):
        tree = deepspeed_config(config, data, universal)
        if config.parallel.shards_gradients:
            return sharded(config, tree, on_progress)
        return pipelined(config, stages, tree, on_progress)
