"""Compares two things of one kind."""

from pathlib import Path
from typing import Any

from torch import Tensor

from infini_ds.errors import UserError
from infini_ds.inspection.weights import relative_changes
from infini_ds.runs.checkpoint import read_weights
from infini_ds.runs.export import open_model

_NOT_COMPARED = ("kind", "path", "gates", "bytes", "problems", "norms")


def difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Returns what differs between two results of `describe`.

    A run is compared by its newest valid checkpoint.

    Returns:
        "settings": [before, after] of each that differs; "changes": see `relative_changes`, for two
            models of the same shape, otherwise None.

    Raises:
        UserError: the two are of different kinds.
    """
    before, after = _comparable(before), _comparable(after)
    if before["kind"] != after["kind"]:
        raise UserError(
            f"--diff: {before['path']} ({before['kind']}) and {after['path']} ({after['kind']}) "
            "must be of one kind"
        )
    one, other = (
        _flat({name: value for name, value in each.items() if name not in _NOT_COMPARED})
        for each in (before, after)
    )
    settings = {
        name.removeprefix("settings."): [one.get(name), other.get(name)]
        for name in dict.fromkeys((*one, *other))
        if one.get(name) != other.get(name)
    }
    changes = None
    if before["gates"] and after["gates"]:  # both are exports or intact checkpoints
        weights = (_weights_of(each["kind"], Path(each["path"])) for each in (before, after))
        changes = relative_changes(*weights, num_layers=len(before["gates"]))
    return {"settings": settings, "changes": changes}


def _weights_of(kind: str, path: Path) -> dict[str, Tensor]:
    if kind == "checkpoint":
        return read_weights(path)
    weights = open_model(path).weights
    return {name: weights.read(name) for name in weights.metas}


def _comparable(figures: dict[str, Any]) -> dict[str, Any]:
    if figures["kind"] != "run":
        return {"gates": None, **figures}
    if figures["newest_valid"] is None:
        raise UserError(f"--diff: run {figures['path']} has no valid checkpoint")
    return figures["newest_valid"]


def _flat(figures: dict[str, Any]) -> dict[str, Any]:
    """Flattens nested figures to dotted names."""
    flat = {}
    for name, value in figures.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": each for inner, each in _flat(value).items()}
        else:
            flat[name] = value
    return flat
