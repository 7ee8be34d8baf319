"""Starts a benchmark's command again, as several ranks of one thread each, and what these read."""

import os
import subprocess
import sys

import torch

from infini_ds.config import RunConfig
from infini_ds.data.windows import Windows
from infini_ds.errors import RunError
from infini_ds.model.transformer import full_layout


def is_rank() -> bool:
    """Whether `start` has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def start(count: int, name: str, arguments: list[str], limit: float) -> None:
    """Runs `infini-ds bench NAME ARGUMENTS` as `count` ranks.

    Args:
        limit: time limit in seconds.

    Raises:
        RunError: a rank failed, or they were not done in time.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(count), "-m", "infini_ds.cli", "bench", name, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        code = subprocess.run(command, env=environment, timeout=limit, check=False).returncode
    except subprocess.TimeoutExpired:
        raise RunError(f"bench {name}: not done after {limit:g} s") from None
    if code:
        raise RunError(f"bench {name}: a process failed with exit code {code}")


def end() -> None:
    """Ends a rank at once: threads of the process group may abort an orderly exit."""
    sys.stdout.flush()
    os._exit(0)


def random_windows(config: RunConfig, step: int, lanes: range) -> Windows:
    """Makes random windows of some global lanes, the same ones in any layout."""
    train, model = config.train, config.model
    segments, n = train.window_segments, model.segment_length
    size, rows = (segments * n + 1,), []
    for lane in lanes:
        generator = torch.Generator().manual_seed(step * train.batch_size + lane)
        rows.append(torch.randint(model.vocab_size, size, generator=generator))
    tokens = torch.stack(rows)
    layout = full_layout(len(lanes), segments, n, tokens.device)
    return Windows(tokens[:, :-1], tokens[:, 1:], layout, torch.ones(len(lanes), segments * n))
