"""`infini-ds plan`: a run's plan as tables, and as figures for programs."""

import json
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from infini_ds import config as configuration
from infini_ds.config import RunConfig
from infini_ds.data.store import Store
from infini_ds.errors import RunError, UserError
from infini_ds.planning.plan import Plan, alternatives, plan

GIB, MIB = 2**30, 2**20


def run(
    path: str,
    overrides: list[str],
    processes: int,
    memory_gib: float | None,
    tflops: float | None,
    json_path: str | None,
) -> None:
    """Prints the plan of a config and those of its alternatives.

    Args:
        path, overrides: of the config.
        processes: as many as devices.
        memory_gib: of a device, if what does not fit is to be named.
        tflops: that a device sustains, for times.
        json_path: where to write the figures as well.

    Raises:
        UserError: the config is wrong, or the processes do not fit it.
        RunError: a device has not memory enough.
    """
    config = _resolved(configuration.load(path, overrides))
    chosen, others = plan(config, processes), alternatives(config, processes)
    console = Console(highlight=False)
    if not console.is_terminal:  # of a file or a pipe nobody knows the width
        console.width = 120
    _print(chosen, others, config, processes, memory_gib, tflops, console)
    if json_path:
        figures = {
            "processes": processes,
            "config": config.model_dump(),
            "plan": _figures(chosen, processes, tflops),
            "alternatives": [_figures(other, processes, tflops) for other in others],
        }
        Path(json_path).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if memory_gib is not None and chosen.most > memory_gib * GIB:
        raise RunError(
            f"plan: a device needs {chosen.most / GIB:.1f} GiB of {memory_gib:g}; the table shows "
            "layouts that need less"
        )


def _resolved(config: RunConfig) -> RunConfig:
    """With what is known only later: the vocabulary, and the type where it is `auto`: bf16."""
    dtype = "bf16" if config.train.dtype == "auto" else config.train.dtype
    train = config.train.model_copy(update={"dtype": dtype})
    model = config.model.model_copy(update={"vocab_size": _vocab_size(config)})
    return config.model_copy(update={"train": train, "model": model})


def _vocab_size(config: RunConfig) -> int:
    if config.model.vocab_size:
        return config.model.vocab_size
    if Path(config.data.store).exists():
        return Store.open(config.data.store, config.data).tokenizer.vocab_size
    tokenizer = config.data.tokenizer
    if tokenizer.kind == "bytes":
        return 258
    if tokenizer.kind == "sentencepiece" and not tokenizer.model:
        return tokenizer.vocab_size
    raise UserError(
        "plan: the vocabulary is not known before `infini-ds prepare`; add model.vocab_size=NUMBER"
    )


def _times(plan: Plan, processes: int, tflops: float) -> tuple[float, float]:
    """Seconds of a step, and tokens a second."""
    seconds = plan.flops / (processes * tflops * 1e12 * plan.efficiency)
    return seconds, plan.tokens / seconds


def _figures(plan: Plan, processes: int, tflops: float | None) -> dict[str, Any]:
    figures = plan._asdict() | {"efficiency": plan.efficiency, "device_bytes": plan.most}
    figures["stages"] = [
        stage._asdict() | {"needs": stage.needs._asdict(), "device_bytes": stage.device}
        for stage in plan.stages
    ]
    if tflops is not None:
        seconds, rate = _times(plan, processes, tflops)
        figures |= {"step_seconds": seconds, "tokens_per_second": rate}
    return figures


def _print(
    chosen: Plan,
    others: list[Plan],
    config: RunConfig,
    processes: int,
    memory_gib: float | None,
    tflops: float | None,
    console: Console,
) -> None:
    train = config.train
    console.print(
        f"{chosen.parameters / 1e9:.3g} B parameters in {train.dtype} on {processes} processes: "
        f"{len(chosen.stages)} pipeline stages x {chosen.data} data-parallel, "
        f"{chosen.micro_batches} micro-batches of {train.micro_batch_size} lanes in "
        f"{train.chunks} chunks, memories {config.parallel.memory_transport}, checkpointing "
        f"{chosen.checkpointing}"
    )
    console.print(
        f"a step reads {chosen.tokens:,} tokens, {chosen.flops:.3g} FLOPs; of the devices' time "
        f"{chosen.efficiency:.1%} goes into the model, {chosen.waiting:.1%} waits in the pipeline, "
        f"{chosen.again:.1%} computes activations again"
    )
    if tflops is not None:
        seconds, rate = _times(chosen, processes, tflops)
        console.print(
            f"at {tflops:g} TFLOP/s a device: {seconds:.3g} s a step, {rate:,.0f} tokens/s, "
            f"{train.steps * seconds / 86400:.3g} days for {train.steps:,} steps; messages, "
            "reductions and the optimizer come on top"
        )
    columns = {
        "blocks": lambda stage: f"{stage.first_block}-{stage.last_block}",
        "parameters": lambda stage: f"{stage.needs.parameters / 1e6:,.1f} M",
        "weights": lambda stage: _size(stage.needs.weights),
        "optimizer": lambda stage: _size(stage.needs.optimizer),
        "memories": lambda stage: _size(stage.needs.memories),
        "activations": lambda stage: _size(stage.activations),
        "of chunks": lambda stage: str(stage.units),
        "temporary": lambda stage: _size(stage.temporary),
        "all": lambda stage: _size(stage.device),
        "sent a step": lambda stage: _size(stage.sent),
    }
    if config.parallel.offload_optimizer:
        columns["on the host"] = lambda stage: _size(stage.needs.offloaded)
    table = _table("memory of a device (weights with gradients)", "stage", *columns)
    for index, stage in enumerate(chosen.stages):
        table.add_row(str(index), *(text(stage) for text in columns.values()))
    console.print(table)
    table = _table(
        "layouts", "pipeline x data", "checkpointing", "fullest device", "", "waits", "again",
        "into the model",
    )  # fmt: skip
    for other in sorted(others, key=lambda other: -other.efficiency):
        fits = memory_gib is None or other.most <= memory_gib * GIB
        layout = f"{len(other.stages)} x {other.data}"
        mark = "" if fits else "too much"
        same = (len(chosen.stages), chosen.checkpointing)
        if (len(other.stages), other.checkpointing) == same:
            mark = f"{mark} (the config's)".strip()
        table.add_row(
            layout, other.checkpointing, _size(other.most), mark, f"{other.waiting:.1%}",
            f"{other.again:.1%}", f"{other.efficiency:.1%}",
        )  # fmt: skip
    console.print(table)


def _size(count: int) -> str:
    if count >= GIB:
        return f"{count / GIB:,.1f} GiB"
    return f"{count / MIB:,.1f} MiB" if count else "-"


def _table(title: str, *headings: str) -> Table:
    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    return table
