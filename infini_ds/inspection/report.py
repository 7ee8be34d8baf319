"""Prints descriptions and differences as tables."""

from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from infini_ds.config import RESOLVED, DataConfig
from infini_ds.system.console import Console


def show(figures: dict[str, Any], console: Console) -> None:
    """Prints a result of `describe`."""
    table = _table(f"{figures['kind']} {figures['path']}", "", "")
    for name, value in _rows(figures):
        table.add_row(name, value)
    console.print(table)
    if figures["kind"] == "run" and figures["newest_valid"]:
        show(figures["newest_valid"], console)
    if figures.get("parameters"):
        table = _table("parameters", "part", "number")
        for part, count in figures["parameters"].items():
            table.add_row(part, f"{count:,}")
        console.print(table)
    if figures.get("gates"):
        table = _table("memory's share, sigmoid(beta)", "layer", "mean", "by head")
        for layer, heads in enumerate(figures["gates"]):
            mean = sum(heads) / len(heads)
            table.add_row(str(layer), f"{mean:.3f}", " ".join(f"{head:.3f}" for head in heads))
        console.print(table)


def show_difference(found: dict[str, Any], console: Console) -> None:
    """Prints a result of `difference`."""
    if found["settings"]:
        table = _table("what differs", "", "this", "other")
        for name, values in found["settings"].items():
            table.add_row(name, *map(_text, values))
        console.print(table)
    else:
        console.print("no setting differs")
    if found["changes"]:
        table = _table("change of the weights from this to the other", "part", "relative")
        for part, change in found["changes"].items():
            table.add_row(part, "from 0" if change is None else f"{change:.3%}")
        console.print(table)


def _rows(figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield from {
        "run": _run_rows, "checkpoint": _checkpoint_rows, "export": _export_rows,
        "store": _store_rows, "memory": _memory_rows,
    }[figures["kind"]](figures)  # fmt: skip
    for part, size in figures["bytes"].items():
        yield f"bytes, {part}", f"{size:,}"
    if "problems" in figures:
        yield "checksums", "; ".join(figures["problems"]) or "valid"


def _run_rows(figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, problems in figures["checkpoints"].items():
        yield name, "; ".join(problems) or "valid"


def _checkpoint_rows(figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name in ("step", "tokens", "skipped_steps"):
        yield name.replace("_", " "), _text(figures[name])
    if figures["layout"]:
        layout = figures["layout"]
        yield "layout", f"{layout['pipeline']} pipeline stages x {layout['data']} data-parallel"
    if figures["settings"]:
        model, train = figures["settings"]["model"], figures["settings"]["train"]
        yield from _model_rows(model)
        reading = (
            f"{train['batch_size']} lanes, windows of {train['window_segments']} segments of "
            f"{model['segment_length']:,} tokens, {train['dtype']}"
        )
        yield "reading", reading
        data = DataConfig.model_validate(figures["settings"]["data"], context=RESOLVED)
        stores = [
            corpus.store + (f" ({name} {data.weights[name]:g})" if name else "")
            for name, corpus in data.corpora.items()
        ]
        yield "store", ", ".join(stores)
        yield "tokenizer", figures["tokenizer"]


def _export_rows(figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    settings = figures["settings"]
    yield from _model_rows(settings["model"])
    yield "segment", f"{settings['model']['segment_length']:,} tokens"
    yield "tokenizer", settings["tokenizer"]
    yield "dtype", settings["dtype"]


def _model_rows(model: dict[str, Any]) -> Iterator[tuple[str, str]]:
    kv_heads = model["num_kv_heads"] or model["num_heads"]
    shape = (
        f"{model['num_layers']} layers of {model['hidden_size']}, {model['num_heads']} heads "
        f"({kv_heads} key-value) of {model['head_dim']}, vocabulary {model['vocab_size']:,}"
    )
    yield "model", shape
    options = [name for name in ("write_gate", "short_conv") if model["memory"][name]]
    options += ["sliding window"] if model.get("use_sliding_window") else []
    layers = model["memory"].get("layers")
    options += [] if layers is None else [f"in layers {list(layers)}"]
    yield "memory", ", ".join((f"{model['memory_rule']} rule", *options))


def _store_rows(figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if figures["tokenizer"]:
        yield "tokenizer", ", ".join(f"{k} {v}" for k, v in figures["tokenizer"].items())
    for name, split in (figures["splits"] or {}).items():
        sizes = (f"{split[key]:,} {key}" for key in ("documents", "tokens", "bytes"))
        yield name, ", ".join(sizes)
    for name, value in (figures["settings"] or {}).items():
        yield name, _text(value)


def _memory_rows(figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in figures["settings"].items():
        yield name.replace("_", " "), _text(value)
    yield "model's fingerprint", figures["fingerprint"] or "none"
    yield "open tokens", ", ".join(map(str, figures["open_tokens"]))
    yield "mean norm by layer", " ".join(f"{norm:.4g}" for norm in figures["norms"])


def _table(title: str, *headings: str) -> Table:
    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False,
        show_header=any(headings),
    )  # fmt: skip
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if type(value) is int else str(value)
