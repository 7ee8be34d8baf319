"""Counts the cores that this process may use."""

import os


def cores_at_hand() -> int:
    """Returns the number of cores this process may run on, or all if the system does not tell."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1
