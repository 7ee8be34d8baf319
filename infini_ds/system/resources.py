"""How many cores long work may use, and how it keeps freed memory."""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MMAP_THRESHOLD_MAX = 32 * 2**20
_NEVER = 2**31 - 1


def cores_at_hand() -> int:
    """Those that this process may run on, where the system tells; otherwise all."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Keeps freed blocks in the process instead of giving them back to the system at once.

    By default glibc returns large blocks when they are freed, and each new one costs a page fault
    for every 4 KiB: 9 % of a training step on one core (bf16, segments of 512; nothing at 2048,
    where blocks are larger than glibc can keep), a third of reading a long document. Does nothing
    where there is no glibc.

    On GPUs, if it is called before the first of them is used, PyTorch keeps segments that grow:
    sizes alternate between training, evaluation and generation, and blocks of one would be of no
    use to the others. Whoever has set PyTorch's allocator keeps it as it is.
    """
    if sys.platform != "linux":
        return
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_MAX)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)
