"""The file that makes a directory a checkpoint: names, sizes and checksums, written last."""

import json
import os
import re
from pathlib import Path

from infini_ds.system.causes import one_line
from infini_ds.system.whole_file import sha256_of

NAME = "manifest.json"
FORMAT = 1


def directories(checkpoints: Path) -> list[Path]:
    """Those of a run's checkpoints, by their names; finished or not, newest first."""
    found = [path for path in checkpoints.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(directory: Path) -> int:
    """The step of a checkpoint, by the name of its directory."""
    return int(directory.name.removeprefix("step_"))


def files_of(directory: Path) -> list[str]:
    """All files of a checkpoint but the manifest, sorted, by their path in it."""
    found = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    return sorted(str(path) for path in found if path.name not in (NAME, NAME + ".partial"))


def sha256(path: Path) -> str:
    """Checksum of a file; what was written is on disk when this returns."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return sha256_of(path)


def write(directory: Path, files: dict[str, dict]) -> None:
    """Writes the manifest, atomically; the checkpoint exists from here on.

    Args:
        files: {"size": bytes, "sha256": checksum} of each file.
    """
    partial = directory / (NAME + ".partial")
    with open(partial, "w") as file:
        json.dump({"format": FORMAT, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(directory / NAME)


def listed(directory: Path, version: int = FORMAT) -> dict[str, dict]:
    """What a manifest says of each file, whether or not it is so.

    Args:
        version: format that the manifest must have.

    Raises:
        ValueError: there is no valid manifest.
    """
    try:
        manifest = json.loads((directory / NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"it was not finished (no {NAME})") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{NAME} cannot be read ({one_line(error)})") from None
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or "format" not in manifest:
        raise ValueError(f"{NAME} cannot be read (it has no format or no files)")
    if manifest["format"] != version:
        raise ValueError(f"{NAME} is of format {manifest['format']}, not {version}")
    for name, expected in files.items():
        known = isinstance(expected, dict) and isinstance(expected.get("sha256"), str)
        if not known or type(expected.get("size")) is not int:
            raise ValueError(f"{NAME} cannot be read ({name} has no size or no sha256)")
    return files


def read(directory: Path) -> dict[str, dict]:
    """What a manifest says of each file.

    Raises:
        ValueError: there is no valid manifest, or a file is missing, of another size, or cannot
            be looked at.
    """
    files = listed(directory)
    for name, expected in files.items():
        try:
            size = (directory / name).stat().st_size
        except FileNotFoundError:
            raise ValueError(f"{name} is missing") from None
        except OSError as error:
            raise ValueError(f"{name} cannot be read ({error.strerror})") from None
        if size != expected["size"]:
            raise ValueError(f"{name} has {size} bytes, not {expected['size']}")
    return files
