"""Limits calls that may never return, such as to a frozen host or a hanging file system."""

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def within(seconds: float, call: Callable[[], T], otherwise: T) -> T:
    """Returns what `call` returns, or `otherwise` if it fails or takes longer than `seconds`."""
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
