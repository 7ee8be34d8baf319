"""Explains errors of the system or of a library in one line, with a remedy."""

import os
import re

_HOST_MEMORY = (
    "the host's memory is full, or `ulimit -v` or the container allows no more; in training a "
    "smaller train.batch_size or model helps (`infini-ds plan` says what a layout needs)"
)
_FULL = "make room there, or name another place"
# Patterns match the message, not the error's class: libraries wrap the system's errors.
_SIGNS = [
    (
        r"CUDA out of memory|CUDA error: out of memory|CU\w+_STATUS_ALLOC_FAILED",
        "the GPU's memory is full: a smaller train.micro_batch_size, more train.chunks, "
        "train.activation_checkpointing=block or more parallel.pipeline_stages "
        "(`infini-ds plan` says what a layout needs)",
    ),
    (
        r"shared memory segment|/dev/shm|unable to \w+ shared memory",
        "shared memory (/dev/shm) is full or missing: in a container, `docker run --shm-size=8g`",
    ),
    (r"No space left on device|Errno 28\b|os error 28\b", _FULL),
    (r"Disk quota exceeded|Errno 122\b|os error 122\b", f"this user's quota is used up: {_FULL}"),
    # Messages of NumPy and PyTorch for a write that the system has cut short.
    (
        r"\d+ requested and \d+ written|PytorchStreamWriter failed|\bunexpected pos \d+ vs",
        f"most often the disk is full: {_FULL}",
    ),
    (r"Read-only file system", "name another place"),
    (
        r"Permission denied|Operation not permitted",
        "give this user the right to, or name another place",
    ),
    (
        r"Too many open files",
        "`ulimit -n` allows no more; raise it (`ulimit -n 4096`, or a system's nofile)",
    ),
    (
        r"can't start new thread|Resource temporarily unavailable",
        "`ulimit -u`, `ulimit -v` or the container allows no more threads; raise it",
    ),
    (
        r"can't allocate memory|Cannot allocate memory|failed to map segment|bad_alloc|MemoryError",
        _HOST_MEMORY,
    ),
]
_LONGEST = 300


def cause(error: BaseException) -> str:
    """Describes the error with its remedy; empty if no remedy is known."""
    said, helps = one_line(error), remedy(error)
    return f"{shortened(said)}; {helps}" if helps else ""


def remedy(error: BaseException) -> str:
    """Returns what helps against the error; empty if nothing is known."""
    said = f"{type(error).__name__}: {error}"
    return next((helps for sign, helps in _SIGNS if re.search(sign, said)), "")


def variable(error: BaseException) -> str:
    """Describes an error that names an environment variable that is set; empty otherwise."""
    said = one_line(error)
    for name in re.findall(r"\b[A-Z][A-Z0-9]*_[A-Z0-9_]+\b", said):
        if name in os.environ:
            return f"environment variable {name}={os.environ[name]!r}: {shortened(said)}"
    return ""


def one_line(said: object) -> str:
    """Puts an error or a message on one line; an error without a message gives its class name."""
    if isinstance(said, OSError) and said.strerror:
        return said.strerror if said.filename is None else f"{said.filename}: {said.strerror}"
    text = " ".join(str(said).split())
    return text or (type(said).__name__ if isinstance(said, BaseException) else "")


def shortened(text: str) -> str:
    """Returns the first sentences of a long message."""
    if len(text) <= _LONGEST:
        return text
    end = max(text.rfind(". ", 0, _LONGEST), text.rfind("; ", 0, _LONGEST))
    return text[: end + 1] if end > 0 else text[:_LONGEST] + "..."
