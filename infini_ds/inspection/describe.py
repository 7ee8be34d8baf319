"""Describes a run, a checkpoint, an export, a store or a memory file from what is on disk."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from infini_ds import config as configuration
from infini_ds.config import ExportConfig, RunConfig
from infini_ds.data.store import FORMAT, MANIFEST, SPLITS
from infini_ds.errors import UserError
from infini_ds.inspection.weights import gates, is_gate, parameter_counts
from infini_ds.model.memory import FORMAT as MEMORY_FORMAT
from infini_ds.model.memory import Memory
from infini_ds.runs import manifest
from infini_ds.runs.checkpoint import is_checkpoint, layer_files, read_weights
from infini_ds.runs.directory import RunDirectory
from infini_ds.runs.export import export_tokenizer, is_export, open_model
from infini_ds.runs.tokenizer import kept_tokenizer


def describe(path: Path) -> dict[str, Any]:
    """Describes what a path holds; besides "kind" and "path", the figures depend on the kind.

    Damage is listed under "problems"; figures that cannot be read because of it are None.

    Raises:
        UserError: the path is none of these kinds, or cannot be read.
    """
    try:
        return _described(path)
    except OSError as error:
        raise UserError(f"inspect {path}: cannot be read ({error.strerror})") from None


def _described(path: Path) -> dict[str, Any]:
    if path.is_file():
        return _export(path) if _has_weights(path) else _memory(path)
    if (path / "checkpoints").is_dir():
        return _run(path)
    if (path / "config.yaml").exists() and is_checkpoint(path):
        return _checkpoint(path, _problems(path))
    if any((path / f"{split}.tokens").exists() for split in SPLITS):
        return _store(path)
    if is_export(path):
        return _export(path)
    raise UserError(f"inspect {path}: is not a run, checkpoint, export, store or memory file")


def _run(path: Path) -> dict[str, Any]:
    steps = [checkpoint.path for checkpoint in RunDirectory(path).checkpoints()[::-1]]
    problems = {directory.name: _problems(directory) for directory in steps}
    valid = [directory for directory in steps if not problems[directory.name]]
    return {
        "kind": "run",
        "path": str(path),
        "checkpoints": problems,
        "newest_valid": _checkpoint(valid[-1], []) if valid else None,
        "bytes": {"total": _size(path)},
    }


def _checkpoint(path: Path, problems: list[str]) -> dict[str, Any]:
    state = _json(path / "state.json")
    config: RunConfig | None = None
    try:
        config = configuration.load_resolved(path / "config.yaml")
    except UserError as error:
        problems = problems or [str(error)]
    return {
        "kind": "checkpoint",
        "path": str(path),
        **{name: state.get(name) for name in ("step", "tokens", "skipped_steps", "layout")},
        "settings": None if config is None else config.model_dump(),
        "tokenizer": None if config is None else _place_of_tokenizer(path, config),
        "parameters": None if config is None else parameter_counts(config.model),
        "gates": gates(read_weights(path)) if _weights_are_whole(path, problems) else None,
        "bytes": {
            "weights": sum(file.stat().st_size for file in path.glob("layer_*")),
            "optimizer": sum(file.stat().st_size for file in path.glob("*optim_states.*")),
            "memories": _size(path / "memory"),
            "total": _size(path),
        },
        "problems": problems,
    }


def _export(path: Path) -> dict[str, Any]:
    model = open_model(path)
    assert isinstance(model.settings, ExportConfig)
    weights = model.weights
    dtypes = {str(meta.dtype).removeprefix("torch.") for meta in weights.metas.values()}
    betas = {name: weights.read(name) for name in weights.metas if is_gate(name)}
    return {
        "kind": "export",
        "path": str(path),
        "settings": {
            "model": model.config.model_dump(),
            "tokenizer": _tokenizer(model.settings),
            "dtype": " and ".join(sorted(dtypes)),
        },
        "parameters": parameter_counts(model.config),
        "gates": gates(betas),
        "bytes": {"total": path.stat().st_size if path.is_file() else _size(path)},
    }


def _tokenizer(config: ExportConfig) -> str:
    try:
        tokenizer = export_tokenizer(config)
    except UserError as error:
        return f"none that can be used ({error})"
    return f"{config.tokenizer}, {tokenizer.vocab_size:,} ids" if tokenizer else "none"


def _place_of_tokenizer(checkpoint: Path, config: RunConfig) -> str:
    kind = config.data.tokenizer.kind
    if kind == "bytes":
        return kind
    own = kept_tokenizer(checkpoint, kind)
    return f"{kind}, in {'the checkpoint' if own else 'its run or its store'}"


def _has_weights(file: Path) -> bool:
    """Whether a file is in safetensors format and not a memory file."""
    try:
        with safe_open(file, framework="pt") as content:
            kind = (content.metadata() or {}).get("format", "")
    except (OSError, SafetensorError):
        return False
    return not kind.startswith(MEMORY_FORMAT.rpartition(".")[0])


def _store(path: Path) -> dict[str, Any]:
    told = _json(path / MANIFEST)
    return {
        "kind": "store",
        "path": str(path),
        **{name: told.get(name) for name in ("tokenizer", "splits", "settings")},
        "bytes": {"total": _size(path)},
        "problems": _problems(path, FORMAT),
    }


def _memory(path: Path) -> dict[str, Any]:
    memory = Memory.load(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    layers, documents, _, kv_heads, head_dim = memory.keys.shape
    return {
        "kind": "memory",
        "path": str(path),
        "settings": {
            "layers": layers,
            "memory_layers": "all" if memory.memory_layers is None else [*memory.memory_layers],
            "documents": documents,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "segment_length": memory.keys.shape[2],
            "memory_rule": memory.rule,
            "dtype": str(memory.keys.dtype).removeprefix("torch."),
            "write_gate": memory.weights.shape[-1] > 0,
            "short_conv": memory.tail.shape[2] > 0,
            "use_sliding_window": memory.window.shape[2] > 0,
        },
        "fingerprint": metadata.get("fingerprint"),
        "open_tokens": list(memory.lengths),
        "norms": [layer.mean_norm() for layer in memory.layers()],
        "bytes": {"total": path.stat().st_size},
    }


def _problems(directory: Path, version: int = manifest.FORMAT) -> list[str]:
    return list(manifest.problems(directory, checksums=True, version=version))


def _weights_are_whole(checkpoint: Path, problems: list[str]) -> bool:
    try:
        files = manifest.listed(checkpoint)
    except ValueError:
        return False
    layers = [file.name for file in layer_files(checkpoint)]
    return all(name in files for name in layers) and not any(
        problem.startswith("layer_") for problem in problems
    )


def _json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file; {} if that fails."""
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
