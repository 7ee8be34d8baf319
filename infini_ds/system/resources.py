"""How many cores long work may use, how much memory it takes, and how it keeps freed memory."""

import ctypes
import os
import sys
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MMAP_THRESHOLD_MAX = 32 * 2**20
_NEVER = 2**31 - 1


def cores_at_hand() -> int:
    """Returns the number of cores this process may run on, or all if the system does not tell."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def memory_taken(name: str) -> int:
    """Returns a line of this process's status on Linux, in bytes.

    Args:
        name: VmRSS now, VmHWM at most so far, which unlike ru_maxrss is not the parent's.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def keep_freed_memory() -> None:
    """Keeps freed blocks in the process instead of returning them to the system at once.

    By default glibc returns large blocks when they are freed, and each new one costs a page fault
    for every 4 KiB. That takes 9 % of a training step on one core (bf16, segments of 512; nothing
    at 2048, where blocks are too large for glibc to keep), and a third of the time to read a long
    document. Without glibc this has no effect.

    If it is called before the first use of a GPU, PyTorch uses expandable segments there, because
    block sizes alternate between training, evaluation and generation, and could not be shared
    otherwise. Allocator settings made by the user stay as they are.
    """
    if sys.platform != "linux":
        return
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    _call_glibc("mallopt", _M_MMAP_THRESHOLD, _MMAP_THRESHOLD_MAX)
    _call_glibc("mallopt", _M_TRIM_THRESHOLD, _NEVER)


def give_blocks_their_own_pages() -> None:
    """Maps each block of 64 KiB or more, so that the memory taken is that in use, without gaps.

    This is slow, and meant for measuring. Without glibc it has no effect.
    """
    _call_glibc("mallopt", _M_MMAP_THRESHOLD, 2**16)


def give_back_freed_memory() -> None:
    """Returns freed pages to the system, those between blocks in use as well.

    glibc seldom finds a freed block again that PyTorch asks for with the same size, because PyTorch
    wants it aligned. If something small was kept beside it, the heap grows by a block each time.
    After 32 chunks of a window with checkpointed blocks, three quarters of the heap were such gaps.
    Without glibc this has no effect.
    """
    _call_glibc("malloc_trim", 0)


def _call_glibc(name: str, *arguments: int) -> None:
    """Calls a function that glibc alone has; elsewhere does nothing."""
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*arguments)
