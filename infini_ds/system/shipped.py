"""Finds the configs and launchers that come with the package, in a checkout or an installation."""

import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Literal

_CHECKOUT = Path(__file__).parents[2]
_INSTALLED = "share/infini_ds"
"""Where pyproject.toml puts them, below the environment."""


def folder(kind: Literal["configs", "launch"]) -> Path | None:
    """Returns the folder of the shipped configs or launchers; None if there is none."""
    if (_CHECKOUT / "pyproject.toml").is_file() and (_CHECKOUT / kind).is_dir():
        return _CHECKOUT / kind
    try:
        files = distribution("infini-ds").files or []
    except PackageNotFoundError:
        return None
    for file in files:
        if file.parent.as_posix().endswith(f"{_INSTALLED}/{kind}"):
            return Path(str(file.locate())).resolve().parent
    return None


def configs() -> dict[str, Path]:
    """Returns the shipped configs by their names."""
    found = folder("configs")
    return {path.stem: path for path in sorted(found.glob("*.yaml"))} if found else {}


def config(given: Path) -> Path:
    """Returns the file of a config that is given as a path, or by the name of a shipped one."""
    if not given.exists() and re.fullmatch(r"\w+", str(given)):
        return configs().get(str(given), given)
    return given


def about(path: Path) -> str:
    """Returns the first sentence of a config's comment."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# yaml-language-server"):
            lines.append(line.removeprefix("#").strip())
    text = " ".join(lines)
    return re.split(r"(?<=[.:]) (?=[A-Z`])", text)[0].rstrip(".:")
