"""`infini-ds plan`: prints a run's plan as tables, and writes it as figures for programs."""

import math
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from infini_ds import config as configuration
from infini_ds.config import RunConfig
from infini_ds.data.mixture import Mixture
from infini_ds.data.packing import useful_share
from infini_ds.data.store import Store
from infini_ds.data.tokenizer import load_tokenizer
from infini_ds.errors import RunError, UserError
from infini_ds.planning.plan import (
    Engine,
    Plan,
    alternatives,
    divisors,
    engines,
    least_memory,
    plan,
    with_context,
)
from infini_ds.system.compute_type import device_at_hand, fastest_type
from infini_ds.system.console import Console
from infini_ds.system.figures import write_figures

GIB, MIB = 2**30, 2**20


class Devices(NamedTuple):
    """The devices that the run is to have."""

    count: int
    """Number of devices, one per process."""
    memory_gib: float | None
    """Memory of each device; if given, the plan names what does not fit."""
    tflops: float | None
    """TFLOP/s that each device sustains; if given, the plan includes times."""

    @property
    def bytes(self) -> float:
        """Memory of each device, endless if unknown."""
        return math.inf if self.memory_gib is None else self.memory_gib * GIB

    def hold(self, plan: Plan) -> bool:
        """Whether the plan fits into their memory, or the memory is unknown."""
        return plan.most <= self.bytes


def run(path: str, overrides: list[str], devices: Devices, json_path: str | None) -> None:
    """Prints the plan of a config and better ones, and writes their figures if asked to.

    Raises:
        UserError: the config is wrong, or the number of processes does not fit it.
        RunError: a device does not have enough memory.
    """
    asked = configuration.load(path, overrides)
    fastest = fastest_type(device_at_hand())
    config = _resolved(asked, fastest.dtype)
    _check_processes(config, devices.count)
    chosen = plan(config, devices.count)
    others = alternatives(config, devices.count, devices.bytes)
    console = Console(must_be_read=True)
    _print_plan(chosen, config, devices, console)
    if chosen.context > 1:
        _print_sharing(chosen, config, devices, console)
    useful = _useful_tokens(config)
    if useful:
        console.print(
            f"useful tokens, which are not padding: {useful['packed']:.1%} with data.packing, "
            f"{useful['unpacked']:.1%} without"
        )
    if asked.train.dtype == "auto":
        console.print(
            f"train.dtype is auto: {fastest.dtype} here, since {fastest.why}; "
            "set it for other devices"
        )
    _print_layouts(chosen, others, devices, console)
    compared = engines(config, devices.count, devices.bytes)
    if devices.count > 1:
        _print_engines(compared, console)
    figures = {
        "processes": devices.count,
        "config": config.model_dump(),
        "useful_tokens": useful,
        "plan": _figures(chosen, devices),
        "alternatives": [_figures(other, devices) for other in others],
        "engines": [
            {"zero_stage": each.zero_stage, **_figures(each.plan, devices)} for each in compared
        ],
    }
    write_figures(json_path, figures)
    if not devices.hold(chosen):
        needs = f"plan: a device needs {_size(chosen.most)} of {devices.memory_gib:g} GiB"
        shared = _fitting_context(chosen, config, devices)
        if shared is not None:
            with_it = f"parallel.context_parallel={shared.context}"
            needs += f", and only {_size(shared.most)} with {with_it}"
        if others:
            raise RunError(f"{needs}; the table shows layouts that need less")
        if shared is not None:
            raise RunError(needs)
        least = min(chosen.most, least_memory(config, devices.count))
        may_offload = not config.parallel.offload_optimizer and config.optimizer.name == "adamw"
        offloading = " or parallel.offload_optimizer" if may_offload else ""
        raise RunError(
            f"{needs}, and no layout of {devices.count} processes needs less than {_size(least)}; "
            f"more processes{offloading} may fit"
        )


def _check_processes(config: RunConfig, count: int) -> None:
    """If this number of processes does not fit the config, names the nearest that do, and how many
    ranks would have to share windows for all to be used."""
    try:
        config.data_parallel_size(count)
    except UserError as error:
        below, above = range(count - 1, 0, -1), range(count + 1, 2 * count + 1)
        found = (next((n for n in numbers if _fits(config, n)), None) for numbers in (below, above))
        would_do = " or ".join(str(number) for number in found if number)
        remedies = [f"{would_do} processes would do"] if would_do else []
        contexts = (n for n in _contexts(config) if _fits(with_context(config, n), count))
        if context := next(contexts, None):
            remedies.append(f"parallel.context_parallel={context} would use all {count}")
        remedy = ", and ".join(remedies)
        raise UserError(f"{error}; {remedy}" if remedy else str(error)) from None


def _contexts(config: RunConfig) -> list[int]:
    """Returns how many ranks can share the segments of a chunk."""
    return divisors(config.train.window_segments // config.train.chunks)


def _fitting_context(chosen: Plan, config: RunConfig, devices: Devices) -> Plan | None:
    """Returns the same layout with the fewest more ranks to a window with which devices hold it."""
    for context in _contexts(config):
        changed = with_context(config, context, len(chosen.stages))
        if context <= chosen.context or not _fits(changed, devices.count):
            continue
        shared = plan(changed, devices.count)
        if devices.hold(shared):
            return shared
    return None


def _fits(config: RunConfig, count: int) -> bool:
    try:
        return config.data_parallel_size(count) > 0
    except UserError:
        return False


def _resolved(config: RunConfig, fastest: str) -> RunConfig:
    """Fills in what a run learns only later: the vocabulary, and the type if it is `auto`."""
    dtype = fastest if config.train.dtype == "auto" else config.train.dtype
    train = config.train.model_copy(update={"dtype": dtype})
    model = config.model.model_copy(update={"vocab_size": vocab_size(config)})
    return config.model_copy(update={"train": train, "model": model})


def vocab_size(config: RunConfig) -> int:
    """Returns the size of the vocabulary, before `infini-ds prepare` too where it is known.

    Raises:
        UserError: it is not known yet.
    """
    if config.model.vocab_size:
        return config.model.vocab_size
    for corpus in config.data.corpora.values():
        if Path(corpus.store).exists():
            return Store.open(corpus.store, corpus).tokenizer.vocab_size
    tokenizer = config.data.tokenizer
    if tokenizer.kind == "bytes":
        return load_tokenizer(tokenizer.kind).vocab_size
    if tokenizer.kind == "sentencepiece" and not tokenizer.model:
        return tokenizer.vocab_size
    raise UserError(
        "the vocabulary is not known before `infini-ds prepare`; add model.vocab_size=NUMBER"
    )


def _useful_tokens(config: RunConfig) -> dict[str, float]:
    """Returns which share of the positions holds tokens; empty before `infini-ds prepare`."""
    stores = (Path(corpus.store) for corpus in config.data.corpora.values())
    if config.train.curriculum or not all(store.exists() for store in stores):
        return {}
    data = Mixture.open(config.data)
    lengths, n = data.split("train").lengths, config.model.segment_length
    return {
        name: useful_share(lengths, n, packing, data.shares, config.seed)
        for name, packing in (("packed", True), ("unpacked", False))
    }


def _times(plan: Plan, devices: Devices) -> tuple[float, float]:
    """Returns the seconds of a step, and the tokens per second."""
    assert devices.tflops is not None
    seconds = plan.flops / (devices.count * devices.tflops * 1e12 * plan.efficiency)
    return seconds, plan.tokens / seconds


def _figures(plan: Plan, devices: Devices) -> dict[str, Any]:
    figures = plan._asdict() | {"efficiency": plan.efficiency, "device_bytes": plan.most}
    figures["stages"] = [
        stage._asdict() | {"needs": stage.needs._asdict(), "device_bytes": stage.device}
        for stage in plan.stages
    ]
    if devices.tflops is not None:
        seconds, rate = _times(plan, devices)
        figures |= {"step_seconds": seconds, "tokens_per_second": rate}
    return figures


def _print_plan(plan: Plan, config: RunConfig, devices: Devices, console: Console) -> None:
    train = config.train
    sharing = f", {plan.exchange:.1%} serves to share windows" if plan.context > 1 else ""
    console.print(
        f"{_parameters(plan.parameters)} parameters in {train.dtype} on {devices.count} processes: "
        f"{config.parallel.describe(len(plan.stages), plan.data)}, {plan.micro_batches} "
        f"micro-batches of {train.micro_batch_size} lanes in {plan.chunks} chunks, memories "
        f"{config.parallel.memory_transport}, checkpointing {plan.checkpointing}"
    )
    console.print(
        f"a step reads {plan.tokens:,} tokens, {plan.flops:.3g} FLOPs; of the devices' time "
        f"{plan.efficiency:.1%} goes into the model, {plan.waiting:.1%} waits in the pipeline, "
        f"{plan.again:.1%} computes activations again{sharing}"
    )
    if devices.tflops is not None:
        seconds, rate = _times(plan, devices)
        console.print(
            f"at {devices.tflops:g} TFLOP/s a device: {seconds:.3g} s a step, {rate:,.0f} tokens/s,"
            f" {train.steps * seconds / 86400:.3g} days for {train.steps:,} steps; messages, "
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
        "waits": lambda stage: f"{stage.waiting:.1%}",
    }
    if config.parallel.offload_optimizer:
        columns["on the host"] = lambda stage: _size(stage.needs.offloaded)
    table = _table("a device of each stage (weights with sums of gradients)", "stage", *columns)
    for index, stage in enumerate(plan.stages):
        table.add_row(str(index), *(text(stage) for text in columns.values()))
    console.print(table)


def _print_sharing(chosen: Plan, config: RunConfig, devices: Devices, console: Console) -> None:
    """Says what it brings and costs to share windows, beside the same run on one device to each."""
    alone = plan(with_context(config, 1, len(chosen.stages)), devices.count // chosen.context)
    kept, without = (max(stage.activations for stage in each.stages) for each in (chosen, alone))
    sent = max(stage.exchanged for stage in chosen.stages)
    console.print(
        f"{chosen.context} ranks share each window: a device keeps {_size(kept)} of activations "
        f"where a window of its own would take {_size(without)}, and sends the others "
        f"{_size(sent)} a step for it{_unused(chosen, config, devices)}"
    )


def _unused(chosen: Plan, config: RunConfig, devices: Devices) -> str:
    """Says how many devices could be used if no window was shared, unless all could."""
    lanes, stages = config.train.batch_size, len(chosen.stages)
    used = lanes // config.train.micro_batch_size * stages
    if used >= devices.count:
        return ""
    return f"; otherwise {lanes} lanes in {stages} stages use {used} of {devices.count} devices"


def _print_layouts(chosen: Plan, others: list[Plan], devices: Devices, console: Console) -> None:
    plans = [other for other in others if devices.hold(other)]
    if chosen not in plans:
        plans.append(chosen)
        plans.sort(key=lambda each: -each.efficiency)
    title = "layouts that no other beats in both memory and use of time"
    if devices.memory_gib is not None:
        title += f", in {devices.memory_gib:g} GiB"
    table = _table(
        title, "pipeline x data", "ranks to a window", "chunks", "checkpointing", "fullest device",
        "waits", "again", "shares", "into the model", "",
    )  # fmt: skip
    for each in plans:
        table.add_row(
            f"{len(each.stages)} x {each.data}", str(each.context), str(each.chunks),
            each.checkpointing, _size(each.most), f"{each.waiting:.1%}", f"{each.again:.1%}",
            f"{each.exchange:.1%}" if each.context > 1 else "-", f"{each.efficiency:.1%}",
            "this one" if each == chosen else "",
        )  # fmt: skip
    console.print(table)


def _print_engines(compared: list[Engine], console: Console) -> None:
    table = _table(
        "the same run with a pipeline and without one (what a device sends in a step at most)",
        "pipeline x data", "ZeRO", "chunks", "checkpointing", "fullest device", "to stages",
        "gradients, weights", "waits", "into the model",
    )  # fmt: skip
    for zero_stage, each in compared:
        table.add_row(
            f"{len(each.stages)} x {each.data}", str(zero_stage), str(each.chunks),
            each.checkpointing, _size(each.most), _size(max(stage.sent for stage in each.stages)),
            _size(max(stage.reduced for stage in each.stages)), f"{each.waiting:.1%}",
            f"{each.efficiency:.1%}",
        )  # fmt: skip
    console.print(table)


def _parameters(count: int) -> str:
    return f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.3g} M"


def _size(count: int) -> str:
    if count >= GIB:
        return f"{count / GIB:,.1f} GiB"
    return f"{count / MIB:,.1f} MiB" if count else "-"


def _table(title: str, *headings: str) -> Table:
    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    return table
