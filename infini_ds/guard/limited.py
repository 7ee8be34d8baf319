"""Calls that may never return: a store whose host is frozen, a file system that hangs."""

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def within(seconds: float, call: Callable[[], T], otherwise: T) -> T:
    """What `call` returns, or `otherwise` if it fails or has not returned in time."""
    results: list[T] = []

    def run() -> None:
        try:
            results.append(call())
        except Exception:
            return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else otherwise
