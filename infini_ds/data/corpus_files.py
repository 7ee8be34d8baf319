"""Finds the files of a corpus, tells their kind, and notices when they change."""

import glob
import hashlib
import os
import sysconfig
from pathlib import Path

from infini_ds.data import text_files
from infini_ds.errors import UserError
from infini_ds.system.paths import as_path, check_name

_READ_BYTES = 1 << 20
# A larger file is hashed only at its beginning and its end.
_HASHED_WHOLE = 64 << 20


def library_sources() -> list[Path]:
    """Lists the sources of the running Python's own library, always in the same order.

    Raises:
        UserError: this Python was installed without its sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in ("site-packages", "dist-packages")]
        sources += [Path(folder, name) for name in names if name.endswith(".py")]
    if not sources:
        raise UserError(
            f"data.source python-stdlib: {root} has no .py files; use a Python that has its sources"
        )
    return sorted(sources, key=lambda path: path.relative_to(root).as_posix())


def matching(patterns: list[str]) -> list[Path]:
    """Lists the files that match, in the order of the patterns and sorted within each pattern.

    A file that is reached by several names is listed once.

    Raises:
        UserError: a pattern matches no file.
    """
    found: dict[str, str] = {}
    for pattern in patterns:
        try:
            expanded = as_path(pattern)
            if os.path.isdir(expanded):
                within = os.path.join(pattern, "*")
                raise ValueError(f"{pattern}: is a directory; name its files: {within}")
            files = [expanded]
            if not text_files.exists(expanded):
                files = sorted(
                    path
                    for path in glob.iglob(_as_glob(expanded), recursive=True)
                    if os.path.isfile(path)
                )
            if not files:
                raise ValueError(f"{pattern or repr(pattern)}: no such file")
            for path in files:
                check_name(path)
        except ValueError as error:
            raise UserError(f"data.files {error}") from None
        for path in files:
            found.setdefault(os.path.realpath(path), path)
    return [Path(path) for path in found.values()]


def _as_glob(path: str) -> str:
    """Escapes the longest leading part of a path that exists as it is written."""
    literal = path
    while literal and not os.path.exists(literal):
        literal = os.path.dirname(literal.rstrip("/"))
    return glob.escape(literal) + path[len(literal) :]


def digest_of(path: Path) -> bytes:
    """Computes a checksum that changes when the file does; a large file is read only in part."""
    digest = hashlib.sha256()
    with path.open("rb") as content:
        size = os.fstat(content.fileno()).st_size
        digest.update(size.to_bytes(8, "big"))
        if size > _HASHED_WHOLE:
            digest.update(content.read(_READ_BYTES))
            content.seek(-_READ_BYTES, os.SEEK_END)
        while block := content.read(_READ_BYTES):
            digest.update(block)
    return digest.digest()


def kind_of(path: Path) -> str:
    """Tells from a file's name what it holds: `text`, `json` or `parquet`.

    Raises:
        UserError: the extension is none that we read.
    """
    compressed = text_files.compression(path) != ""
    suffixes = path.suffixes[:-1] if compressed else path.suffixes
    suffix = "".join(suffixes[-1:]).lower()
    if suffix in ("", ".txt"):
        return "text"
    if suffix in (".jsonl", ".ndjson", ".json"):
        return "json"
    if suffix == ".parquet" and not compressed:
        return "parquet"
    raise UserError(
        f"data.files {path}: must be .txt, .jsonl, .ndjson or .json (also .gz or .zst), .parquet, "
        "or plain text without an extension"
    )


def unreadable(path: Path, error: Exception) -> UserError:
    """Builds the error that says why a file cannot be read."""
    return UserError(f"data.files {path}: cannot be read ({text_files.reason_of(error)})")
