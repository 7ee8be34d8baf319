"""Translates CUDA_VISIBLE_DEVICES into the numbers that DeepSpeed's launcher understands."""

import json
import os
import subprocess
import sys

from infini_ds.errors import UserError

_NAME = "CUDA_VISIBLE_DEVICES"
_HIDDEN = ("", "NoDevFiles", "none", "void")
_LIST = (
    "import json, torch; print(json.dumps([str(torch.cuda.get_device_properties(i).uuid) "
    "for i in range(torch.cuda.device_count())]))"
)


def translate_visible_devices() -> None:
    """Rewrites the variable, whose entries the launcher takes for slots, as CUDA would read it.

    On a CPU run the variable is dropped, because slots there are no GPUs. If it hides all GPUs, the
    run uses the CPU, as DeepSpeed does on a machine without GPUs.

    Raises:
        UserError: an entry is not a GPU of this machine, or not one that the launcher can name.
    """
    if _NAME not in os.environ:
        return
    value = os.environ.pop(_NAME)
    entries = [entry.strip() for entry in value.split(",")]
    accelerator = os.environ.get("DS_ACCELERATOR")
    if accelerator == "cpu":
        return
    if entries[0] in _HIDDEN or entries[0].startswith("-"):
        if accelerator:
            raise UserError(
                f"environment variable {_NAME}={value!r}: hides all GPUs, and DS_ACCELERATOR is "
                f"{accelerator}; unset one of them"
            )
        os.environ["DS_ACCELERATOR"] = "cpu"
        return
    if uuids := _uuids():
        os.environ[_NAME] = ",".join(str(_number(entry, value, uuids)) for entry in entries)


def _number(entry: str, value: str, uuids: list[str]) -> int:
    """Returns the number of a GPU given by its number or by the beginning of its UUID."""
    if entry.isdecimal() and int(entry) < len(uuids):
        return int(entry)
    named = entry.removeprefix("GPU-")
    found = [i for i, uuid in enumerate(uuids) if uuid.removeprefix("GPU-").startswith(named)]
    if entry.startswith("GPU-") and len(found) == 1:
        return found[0]
    raise UserError(
        f"environment variable {_NAME}={value!r}: {entry!r} is not a GPU of this machine; it has "
        f"{len(uuids)}, from 0 to {len(uuids) - 1} (`nvidia-smi -L`). For parts of GPUs (MIG) "
        "start the run with torchrun"
    )


def _uuids() -> list[str]:
    """Returns the UUIDs of all GPUs of this machine; takes as long as loading torch."""
    command = [sys.executable, "-c", _LIST]  # keeps torch and a GPU context out of this process
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else []
