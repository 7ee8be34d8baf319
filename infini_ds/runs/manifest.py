"""The manifest, written last, makes a directory a checkpoint: it lists sizes and checksums."""

import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from infini_ds.system.causes import one_line
from infini_ds.system.whole_file import sha256_of

NAME = "manifest.json"
FORMAT = 1
UNFINISHED = f"it was not finished (no {NAME})"


def files_of(directory: Path) -> list[str]:
    """Lists all files of a checkpoint but the manifest, sorted, as paths relative to it."""
    found = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    return sorted(str(path) for path in found if path.name not in (NAME, NAME + ".partial"))


def sha256(path: Path) -> str:
    """Computes the checksum of a file, whose content is on disk when this returns."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return sha256_of(path)


def entry(path: Path) -> dict[str, int | str]:
    """Describes a file, whose content is on disk when this returns."""
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def write(directory: Path, files: dict[str, dict]) -> None:
    """Writes the manifest atomically, which makes the checkpoint valid.

    Args:
        files: for each file, {"size": bytes, "sha256": checksum}.
    """
    partial = directory / (NAME + ".partial")
    with open(partial, "w") as file:
        json.dump({"format": FORMAT, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(directory / NAME)


def listed(directory: Path, version: int = FORMAT) -> dict[str, dict]:
    """Reads the manifest's entry of each file, without checking the files.

    Args:
        version: the format that the manifest must have.

    Raises:
        ValueError: there is no valid manifest.
    """
    try:
        manifest = json.loads((directory / NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(UNFINISHED) from None
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


def problems(
    directory: Path,
    checksums: bool,
    names: Collection[str] | None = None,
    version: int = FORMAT,
) -> Iterator[str]:
    """Yields a line for every way in which a directory's files differ from its manifest.

    Args:
        checksums: whether to compare checksums, which reads the files; otherwise only sizes.
        names: the only files to examine; by default all that the manifest lists.
        version: the format that the manifest must have.
    """
    try:
        files = listed(directory, version)
    except ValueError as error:
        yield str(error)
        return
    for name in files if names is None else names:
        problem = _problem(directory / name, files.get(name), checksums)
        if problem:
            yield f"{name} {problem}"


def _problem(file: Path, expected: dict | None, checksum: bool) -> str | None:
    if expected is None:
        return "is not in the manifest"
    try:
        size = file.stat().st_size
        if not file.is_file():
            return "is no file"
        if size != expected["size"]:
            return f"has {size} bytes, not {expected['size']}"
        if checksum and sha256_of(file) != expected["sha256"]:
            return "does not have its checksum"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None
