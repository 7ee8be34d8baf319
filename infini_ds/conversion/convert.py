"""The conversions of `infini-ds convert`, each of which streams one tensor at a time."""

import json
import re
import shutil
from pathlib import Path

import torch
from torch import Tensor

from infini_ds.config import LARGEST_GATE, TOKENIZER_FILES, ModelConfig, RunConfig
from infini_ds.conversion import hub, llama, seed
from infini_ds.conversion.destination import check_destination, destination
from infini_ds.conversion.huggingface import special_tokens, write_huggingface
from infini_ds.conversion.pairs import Move, Pair
from infini_ds.conversion.task import Task, kind_of_tokenizer, tokenizer_for, warn, write_tokenizer
from infini_ds.conversion.writer import Plan
from infini_ds.data.tokenizer import load_tokenizer
from infini_ds.errors import UserError
from infini_ds.runs.export import (
    CONFIG,
    METADATA_KEY,
    SOURCE_CONFIG,
    Model,
    check_one_dtype,
    check_tensors,
    config_text,
    copy_tokenizer,
    open_model,
    parameters_of,
)
from infini_ds.runs.weights import (
    PickledWeights,
    Renamed,
    SafetensorsWeights,
    Weights,
)
from infini_ds.system.compute_type import DTYPES
from infini_ds.system.console import Console
from infini_ds.system.progress import BytesBar
from infini_ds.system.ranges import narrowed


def to_safetensors(task: Task, dtype: str | None = None, step: int | None = None) -> None:
    """Writes a run's weights as one file TARGET.safetensors, or as an export directory.

    Args:
        dtype: fp32 or bf16; by default the type the run computes in. For a bf16 run, fp32 takes
            the weights that its optimizer keeps.
        step: step of the checkpoint, if the source is a run.

    Raises:
        UserError: the source cannot be read, or the target cannot be written.
    """
    console = Console()
    model = _open(task, step, console)
    weights = _weights(model, dtype)
    if task.target.suffix != ".safetensors":
        _write_export(task, model, weights, dtype, False, console)
        return
    # A single file has no room for the files of a tokenizer.
    kind = "bytes" if model.tokenizer_kind == "bytes" else None
    plan = Plan(_kept(model, dtype), weights)
    with (
        destination(task.target, task.source, task.force) as partial,
        BytesBar(console, plan.bytes) as bar,
    ):
        plan.write_file(partial, {METADATA_KEY: config_text(model.config, kind)}, bar.done)
    _report(plan, task, console)


def to_hf(task: Task, dtype: str | None = None, step: int | None = None) -> None:
    """Writes an export that transformers can load too, together with the code it needs.

    Args:
        dtype, step: as in `to_safetensors`.

    Raises:
        UserError: the source cannot be read, or the target cannot be written.
    """
    console = Console()
    _require_directory(task)
    model = _open(task, step, console)
    weights = _weights(model, dtype)
    if dtype is None:
        check_one_dtype(weights.metas, weights.origin)
    _write_export(task, model, weights, dtype, True, console)
    console.print(
        f'  AutoModelForCausalLM.from_pretrained("{task.target}", trust_remote_code=True)'
    )


def from_safetensors(task: Task) -> None:
    """Turns a file or a directory of our weights into an export directory.

    Raises:
        UserError: the source cannot be read or has no config, or the target cannot be written.
    """
    console = Console()
    _require_directory(task)
    model = _open(task, None, console)
    _write_export(task, model, model.weights, None, False, console)


def from_llama(task: Task, segment_length: int, gate_init: float, memory_rule: str) -> None:
    """Turns a plain model of the Llama family into an export directory, for further pretraining.

    The source may be a name on the Hugging Face hub.

    Args:
        segment_length: number of tokens within which local attention sees.
        gate_init: beta of all gates; the memory's share of a head's output is sigmoid(beta).
        memory_rule: name of the rule by which segments are written.

    Raises:
        UserError: the source cannot be read or has a feature that our model lacks, or the target
            cannot be written.
    """
    console = Console()
    if not abs(gate_init) <= LARGEST_GATE:
        raise UserError(
            f"--gate-init ({gate_init:g}) must be from -{LARGEST_GATE:g} to {LARGEST_GATE:g}"
        )
    _require_directory(task)
    check_destination(task.target, task.source, task.force)
    source, on_hub = task.source, hub.is_name(task.source)
    if on_hub:  # refuse a model before its gigabytes are downloaded
        source = hub.download(str(task.source), weights=False)
    tree = llama.read_config(source / "config.json")
    path = task.source / "config.json"
    config = llama.from_config(tree, path, segment_length, gate_init, memory_rule)
    kind = kind_of_tokenizer(source, config, task, console)
    longest = tree.get("max_position_embeddings")
    if longest is not None and segment_length > longest:
        warn(
            console,
            f"--segment-length ({segment_length}) is above max_position_embeddings ({longest}): "
            "the model has not seen such positions",
        )
    if on_hub:
        source = hub.download(str(task.source), weights=True)
    weights = SafetensorsWeights(source)
    ignored = [llama.ROTARY] + ([llama.HEAD] if config.tie_embeddings else [])
    _drop(weights, ignored)
    pairs = llama.table(config)
    _check_theirs(pairs, config, weights, path)
    dtype = weights.metas[pairs[0].theirs[0]].dtype

    def gate(_: list[Tensor]) -> list[Tensor]:
        return [torch.full((config.num_heads,), gate_init, dtype=dtype)]

    moves = [pair.inward() for pair in pairs]
    moves += [Move((), (name,), gate) for name in llama.gates(config)]
    plan = Plan(moves, weights, task.shard_bytes)
    with destination(task.target, task.source, task.force) as partial:
        partial.mkdir()
        _write_directory(plan, partial, console)
        copy_tokenizer(source, partial)
        if kind:  # with BOS and EOS, which only config.json may name
            load_tokenizer(kind, source / TOKENIZER_FILES[kind]).save(partial)
        (partial / CONFIG).write_text(config_text(config, kind))
        shutil.copyfile(source / "config.json", partial / SOURCE_CONFIG)
    _report(plan, task, console)
    console.print(f"  train it further with `init_from: {task.target}` in a run's config")


def to_llama(task: Task, step: int | None = None) -> None:
    """Writes the plain model that remains of ours without its memory.

    Raises:
        UserError: the source cannot be read, or is not a plain model even without its memory, or
            the target cannot be written.
    """
    console = Console()
    _require_directory(task)
    model = _open(task, step, console)
    config, origin = model.config, model.weights.origin
    beside = task.source / SOURCE_CONFIG
    before = llama.read_config(beside) if beside.is_file() else None
    tree = llama.to_config(config, origin, _dtype_of(model), before)
    tokenizer = tokenizer_for(model, task, console)
    plan = Plan([p.outward() for p in llama.table(config)], model.weights, task.shard_bytes)
    with destination(task.target, task.source, task.force) as partial:
        partial.mkdir()
        _write_directory(plan, partial, console)
        write_tokenizer(model, tokenizer, task.source, partial)
        if tokenizer and before is None:
            tree |= special_tokens(tokenizer)
        (partial / "config.json").write_text(json.dumps(tree, indent=2) + "\n")
    _report(plan, task, console)
    shares = torch.cat([model.weights.read(name) for name in llama.gates(config)]).float().sigmoid()
    lost = " and the write gates" if config.memory.write_gate else ""
    warn(
        console,
        f"the memory is lost, its gates{lost} are dropped: its share of the heads' outputs was "
        f"{shares.mean():.1%} on average, {shares.max():.1%} at most; the plain model sees only "
        f"its own context, and was trained on positions below {config.segment_length}",
    )


def from_seed(task: Task, segment_length: int, memory_rule: str) -> None:
    """Turns a state_dict of the seed library into an export directory.

    Args:
        segment_length, memory_rule: settings that the state_dict does not contain.

    Raises:
        UserError: the source cannot be read or is no such state_dict, or the target cannot be
            written.
    """
    console = Console()
    _require_directory(task)
    pickled = task.source.suffix in (".pt", ".pth", ".bin")
    if not task.source.is_file():
        raise UserError(f"{task.source}: no such file; name a .safetensors or .pt of a state_dict")
    weights: Weights = PickledWeights(task.source) if pickled else SafetensorsWeights(task.source)
    if weights.metas and all(name.startswith("model.") for name in weights.metas):
        weights = Renamed(weights, "model.")  # saved from its InfiniTransformerWrapper
    config = seed.infer_config(weights.metas, weights.origin, segment_length, memory_rule)
    _drop(weights, [seed.ROTARY])
    pairs = seed.table(config)
    _check_theirs(pairs, config, weights, task.source)
    plan = Plan([pair.inward() for pair in pairs], weights, task.shard_bytes)
    with destination(task.target, task.source, task.force) as partial:
        partial.mkdir()
        _write_directory(plan, partial, console)
        (partial / CONFIG).write_text(config_text(config, None))
    _report(plan, task, console)
    console.print(
        f"  assumed, because a state_dict does not tell: segments of {config.segment_length} "
        f"tokens, {config.memory_rule} memory rule; it has no tokenizer, as no state_dict has one"
    )


def to_seed(task: Task, step: int | None = None) -> None:
    """Writes our model as one file with the seed library's state_dict.

    Raises:
        UserError: the source cannot be read or is not a model that the library can build, or the
            target cannot be written.
    """
    console = Console()
    _require_file(task)
    model = _open(task, step, console)
    config = model.config
    seed.check_config(config, model.weights.origin)
    moves = [pair.outward() for pair in seed.table(config)]
    for name, buffer in seed.rotary_buffers(config).items():
        moves.append(Move((), (name,), lambda _, buffer=buffer: (buffer,)))
    plan = Plan(moves, model.weights)
    with (
        destination(task.target, task.source, task.force) as partial,
        BytesBar(console, plan.bytes) as bar,
    ):
        plan.write_file(partial, {}, bar.done)
    _report(plan, task, console)
    console.print(f"  load it into {seed.constructor(config)}")
    if config.norm_eps > 1e-12:
        warn(
            console,
            f"model.norm_eps is {config.norm_eps}, the seed library's norms have none: outputs "
            "differ slightly",
        )


def _open(task: Task, step: int | None, console: Console) -> Model:
    model = open_model(task.source, step)
    for note in model.notes:
        warn(console, note)
    return model


def _weights(model: Model, dtype: str | None) -> Weights:
    """Returns a model's weights; for a bf16 run in fp32, those that its optimizer keeps."""
    settings, bf16 = model.settings, _dtype_of(model) != torch.float32
    if dtype == "fp32" and model.checkpoint and isinstance(settings, RunConfig) and bf16:
        from infini_ds.conversion.masters import MasterWeights

        return MasterWeights(model.checkpoint, model.weights, settings.optimizer.train)
    return model.weights


def _kept(model: Model, dtype: str | None) -> list[Move]:
    """Copies our weights under our names."""

    def kept(name: str) -> Move:
        def keep(tensors: list[Tensor]) -> list[Tensor]:
            what = f"{model.weights.origin}: tensor {name}"
            return [narrowed(tensors[0], DTYPES[dtype], what)] if dtype else tensors

        return Move((name,), (name,), keep)

    return [kept(name) for name in parameters_of(model.config)]


def _write_export(
    task: Task,
    model: Model,
    weights: Weights,
    dtype: str | None,
    huggingface: bool,
    console: Console,
) -> None:
    check_destination(task.target, task.source, task.force)
    tokenizer = tokenizer_for(model, task, console)
    plan = Plan(_kept(model, dtype), weights, task.shard_bytes)
    with destination(task.target, task.source, task.force) as partial:
        partial.mkdir()
        _write_directory(plan, partial, console)
        if model.checkpoint is None and (task.source / SOURCE_CONFIG).is_file():
            shutil.copyfile(task.source / SOURCE_CONFIG, partial / SOURCE_CONFIG)
        write_tokenizer(model, tokenizer, task.source, partial)
        kind = model.tokenizer_kind if tokenizer else None
        (partial / CONFIG).write_text(config_text(model.config, kind))
        if huggingface:
            stored = DTYPES[dtype] if dtype else _dtype_of(model)
            write_huggingface(partial, partial.name, model, tokenizer, stored)
    _report(plan, task, console)


def _require_file(task: Task) -> None:
    if task.target.suffix != ".safetensors":
        raise UserError(f"{task.target}: must be a file named .safetensors")


def _require_directory(task: Task) -> None:
    if task.target.suffix == ".safetensors":
        raise UserError(
            f"{task.target}: must be a directory; to-safetensors alone makes a single file"
        )


def _dtype_of(model: Model) -> torch.dtype:
    """Returns the dtype of the embedding, the first and largest of the weights."""
    return model.weights.metas["layers.0.weight"].dtype


def _drop(weights: Weights, patterns: list[str]) -> None:
    """Removes tensors that correspond to nothing in our model."""
    for name in list(weights.metas):
        if any(re.fullmatch(pattern, name) for pattern in patterns):
            del weights.metas[name]


def _check_theirs(pairs: list[Pair], config: ModelConfig, weights: Weights, asked_by: Path) -> None:
    """Checks that the source has exactly the tensors that ours are made from.

    Raises:
        UserError: a tensor is missing, superfluous or of another shape or dtype; names it.
    """
    ours = parameters_of(config)
    expected: dict[str, Tensor] = {}
    for pair in pairs:
        expected |= zip(pair.theirs, pair.split(ours[pair.ours]), strict=True)
    check_tensors(weights.metas, expected, weights.origin, asked_by.name)
    for pair in pairs:
        dtypes = {weights.metas[name].dtype for name in pair.theirs}
        if len(dtypes) > 1:
            raise UserError(f"{weights.origin}: {', '.join(pair.theirs)} must have one dtype")


def _write_directory(plan: Plan, directory: Path, console: Console) -> None:
    with BytesBar(console, plan.bytes) as bar:
        plan.write_directory(directory, bar.done)


def _report(plan: Plan, task: Task, console: Console) -> None:
    console.print(
        f"{task.target}: {plan.parameters:,} parameters, {plan.bytes / 1e6:,.1f} MB in "
        f"{plan.files} file{'s' * (plan.files > 1)}"
    )
