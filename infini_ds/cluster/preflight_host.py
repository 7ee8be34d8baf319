"""Answers `infini-ds preflight` on one host: one line per request and answer, both JSON.

Runs as `python -m infini_ds.cluster.preflight_host` until its input ends. Lines with answers begin
with MARK; anything else that a login shell or a library prints is ignored.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

import infini_ds
from infini_ds import config as configuration
from infini_ds.data.opening import open_data
from infini_ds.errors import UserError
from infini_ds.kernels.assembler import choose_ptxas
from infini_ds.system import network
from infini_ds.system.causes import one_line

MARK = "infini-ds-preflight "


def main() -> None:
    """Serves one session."""
    output, sys.stdout = sys.stdout, sys.stderr
    written: list[Path] = []

    def write(path: str) -> str:
        """Returns why a file cannot be written, or ""; the file is deleted with the session."""
        try:
            Path(path).touch(exist_ok=False)
        except OSError as error:
            return error.strerror or str(error)
        written.append(Path(path))
        return ""

    answers: dict[str, Callable[..., Any]] = {
        "clock": time.time, "facts": facts, "write": write, "sees": sees, "route": route,
    }  # fmt: skip

    def answer(value: Any) -> None:
        print(MARK + json.dumps(value), file=output, flush=True)

    try:
        answer("ready")
        for line in sys.stdin:
            request = json.loads(line)
            answer(answers[request.pop("ask")](**request))
    finally:
        for path in written:
            path.unlink(missing_ok=True)


def facts(config: str, overrides: list[str]) -> dict[str, Any]:
    """Returns the facts about this host.

    Returns:
        "errors": why a fact below is missing, by its name;
        "versions": see `versions`;
        "address": see `meeting_address`;
        "devices": free bytes of each visible GPU, empty on a CPU run;
        "ptxas": fields of the `Ptxas` for the first GPU, if there is a GPU and Triton;
        "memory": bytes of the host's memory that are available;
        "processes": how many DeepSpeed starts here by default;
        "config": every setting as this host reads it;
        "output_dir": the directory, or the part of its path that exists, and "disk": free bytes
            there;
        "store": fingerprint of the store, and "vocab_size" of its tokenizer. The store is opened as
            in a run: sizes of all files and checksums of those below 256 MB are compared. The
            manifest's checksums of larger files are part of the fingerprint.
    """
    found: dict[str, Any] = {}
    errors: dict[str, str] = {}

    def tell(name: str, look: Callable[[], Any]) -> Any:
        try:
            found[name] = look()
        except (UserError, ImportError, OSError, RuntimeError) as error:
            errors[name] = one_line(error)
        return found.get(name)

    tell("versions", versions)
    tell("address", network.meeting_address)
    devices = tell("devices", _free_device_memory)
    if devices is not None:
        tell("memory", lambda: psutil.virtual_memory().available)
        tell("processes", lambda: len(devices) or _cpu_processes())
    if devices and importlib.util.find_spec("triton"):
        tell("ptxas", _ptxas)
    settings = tell("config", lambda: configuration.load(config, overrides))
    if settings:
        found["config"] = settings.model_dump()
        directory = tell("output_dir", lambda: str(_existing(Path(settings.output_dir))))
        if directory:
            tell("disk", lambda: shutil.disk_usage(directory).free)
        tell("store", lambda: _open_store(settings, found))
    return {**found, "errors": errors}


def versions() -> dict[str, str]:
    """Returns all versions that must match on every host; ours has a checksum of its sources."""
    told = {"Python": platform.python_version()}
    for name in ("torch", "deepspeed", "infini_ds"):
        try:
            told[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            told[name] = "not installed"
    digest = hashlib.sha256()
    package = Path(infini_ds.__file__).parent
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\n".encode() + file.read_bytes())
    told["infini_ds"] += f" (sources {digest.hexdigest()[:8]})"
    return told


def sees(path: str) -> bool:
    """Returns whether a file exists; network file systems may take a moment to show it."""
    for _ in range(30):
        if Path(path).exists():
            return True
        time.sleep(0.1)
    return False


def route(address: str) -> dict[str, str]:
    """Returns the fields of a `Route`, or the "error"."""
    try:
        return network.route_to_first(address)._asdict()
    except OSError as error:
        return {"error": f"{address}: {error.strerror or error}"}


def _free_device_memory() -> list[int]:
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return []
    import torch

    return [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]


def _ptxas() -> dict[str, str]:
    import torch

    major, minor = torch.cuda.get_device_capability(0)
    return choose_ptxas(10 * major + minor)._asdict()


def _cpu_processes() -> int:
    """Returns what DeepSpeed would start: LOCAL_SIZE, or one per NUMA node if it can count them."""
    value = os.environ.get("LOCAL_SIZE", "0")
    if not value.isdecimal():
        raise UserError(f"environment variable LOCAL_SIZE={value!r}: must be a number, or unset")
    told = int(value)
    if told or not shutil.which("numactl"):
        return told or 1
    nodes = Path("/sys/devices/system/node").glob("node*/cpulist")
    return sum(node.read_text().strip() != "" for node in nodes)


def _existing(path: Path) -> Path:
    return next(each for each in (path, *path.parents) if each.is_dir())


def _open_store(config: configuration.RunConfig, found: dict[str, Any]) -> str:
    data, _ = open_data(config)
    found["vocab_size"] = data.tokenizer.vocab_size
    return data.fingerprint


if __name__ == "__main__":
    main()
