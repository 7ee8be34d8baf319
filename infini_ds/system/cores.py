"""How many cores this process may use."""

import os


def cores_at_hand() -> int:
    """Those that it may run on, where the system tells; otherwise all."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1
