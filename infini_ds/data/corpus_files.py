"""The files of a corpus: which they are, what they hold, whether they have changed."""

import glob
import hashlib
import os
import sysconfig
from pathlib import Path

from infini_ds.data import text_files
from infini_ds.errors import UserError
from infini_ds.system.paths import as_path, check_name

_READ_BYTES = 1 << 20
# Of larger files only the beginning and the end tell whether they have changed.
_HASHED_WHOLE = 64 << 20


def library_sources() -> list[Path]:
    """The running Python's own library, always in the same order.

    Raises:
        UserError: it is not there.
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
    """Files in the order of the patterns, sorted within each, none twice by any name.

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
    """A pattern of which what is there under just this name, or lies on the way, is literal."""
    literal = path
    while literal and not os.path.exists(literal):
        literal = os.path.dirname(literal.rstrip("/"))
    return glob.escape(literal) + path[len(literal) :]


def digest_of(path: Path) -> bytes:
    """A checksum that changes when a file does; large ones are read in part."""
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
    """What a file holds by its name: `text`, `json` or `parquet`.

    Raises:
        UserError: none of these.
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
    """The error that says why a file cannot be read."""
    return UserError(f"data.files {path}: cannot be read ({text_files.reason_of(error)})")
