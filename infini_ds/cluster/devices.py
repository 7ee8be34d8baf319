"""Which devices DeepSpeed's launcher uses: what CUDA_VISIBLE_DEVICES says in numbers it knows."""

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
    """Has the launcher, which takes each entry for one of its slots, see what CUDA would see.

    The slots of a CPU are none of them. Where all GPUs are hidden, the run is one on the CPU, as
    DeepSpeed has it where there are none.

    Raises:
        UserError: an entry is no GPU of this machine, or none that the launcher could name.
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
    """Of a GPU that is named by its number, or by the beginning of its UUID."""
    if entry.isdecimal() and int(entry) < len(uuids):
        return int(entry)
    named = entry.removeprefix("GPU-")
    found = [i for i, uuid in enumerate(uuids) if uuid.removeprefix("GPU-").startswith(named)]
    if entry.startswith("GPU-") and len(found) == 1:
        return found[0]
    raise UserError(
        f"environment variable {_NAME}={value!r}: {entry!r} is no GPU of this machine; it has "
        f"{len(uuids)}, from 0 to {len(uuids) - 1} (`nvidia-smi -L`). For parts of GPUs (MIG) "
        "start the run with torchrun"
    )


def _uuids() -> list[str]:
    """Of all GPUs of this machine, none where there are none; takes as long as torch loads."""
    command = [sys.executable, "-c", _LIST]  # this process needs no torch, nor a context on a GPU
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else []
