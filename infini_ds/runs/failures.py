"""Records what ended a rank, one line each, in failures.jsonl of the run's directory."""

import contextlib
import json
import os
import socket
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

NAME = "failures.jsonl"


def record(output_dir: str | Path, step: int, message: str) -> None:
    """Appends a line in a single write, so that the lines of ranks that end together stay whole.

    A failure to write is ignored, since a full disk may be what ended the rank.
    """
    line = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "rank": int(os.environ.get("RANK", "0")),
        "host": socket.gethostname(),
        "step": step,
        "message": message,
    }
    with contextlib.suppress(OSError):
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        file = os.open(Path(output_dir) / NAME, flags, 0o644)
        try:
            os.write(file, (json.dumps(line) + "\n").encode())
        finally:
            os.close(file)


def read(output_dir: str | Path) -> list[dict[str, Any]]:
    """Reads all recorded failures, oldest first, leaving out lines that were cut off."""
    try:
        lines = (Path(output_dir) / NAME).read_text(errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found
