"""Prepares a checkpoint for resuming in another layout: `infini-ds convert reshard`.

Resuming does this by itself, but then all processes wait for the one that does it, and no longer
than train.timeout.
"""

from pathlib import Path

from infini_ds import config as configuration
from infini_ds.errors import RunError, UserError
from infini_ds.parallel.deepspeed.universal import make_universal, universal_of
from infini_ds.runs.checkpoint import find_checkpoint
from infini_ds.runs.directory import Checkpoint, Depth
from infini_ds.system.console import Console


def reshard(path: Path, step: int | None) -> None:
    """Writes beside a checkpoint the form that any layout can load, where resuming finds it.

    Args:
        path: output_dir of a run, or one of its checkpoints.
        step: step of the checkpoint, if `path` is a run.

    Raises:
        UserError: there is no complete checkpoint, or only its own layout can resume it.
        RunError: the conversion failed.
    """
    console = Console()
    checkpoint, skipped = find_checkpoint(path, step)
    for line in skipped:
        console.print(line, style="yellow")
    if problem := Checkpoint(checkpoint).problem(Depth.CHECKSUMS):
        raise UserError(f"checkpoint {checkpoint}: {problem}; choose another one with --step")
    config = configuration.load_resolved(checkpoint / "config.yaml")
    if config.train.dtype == "fp32" and config.parallel.zero_stage == 0:
        raise UserError(
            f"checkpoint {checkpoint}: is of fp32 without ZeRO (parallel.zero_stage: 0), and can "
            "only be resumed in its own layout"
        )
    if failure := make_universal(checkpoint):
        raise RunError(f"checkpoint {checkpoint} cannot be converted: {failure}")
    console.print(f"{universal_of(checkpoint)}: resume with any number of processes")
