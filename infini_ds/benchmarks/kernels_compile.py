"""Implements `infini-ds bench kernels --compile-only`: compiles the Triton kernels without a GPU.

Every kernel launch in a forward and a backward call is recorded, and each distinct one is compiled
for each target as Triton would compile it at run time. A kernel breaks a rule if it spills
registers to memory (a stack), if it takes more shared memory than a block can have, if one of its
matrix products does not use the matrix instructions of its target's generation, or if, on Hopper,
it touches registers of a product that is still running.
"""

import importlib.util
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import product
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from rich.progress import track
from rich.table import Table

from infini_ds.benchmarks import unfinished_products
from infini_ds.config.model import KERNEL_RULES
from infini_ds.errors import RunError, UserError
from infini_ds.kernels.assembler import Ptxas, choose_ptxas
from infini_ds.kernels.backend import TRITON_HEAD_DIMS
from infini_ds.kernels.infini_attention.reference import Inputs
from infini_ds.layout import Layout
from infini_ds.memory import RULES
from infini_ds.system.console import Console
from infini_ds.system.figures import write_figures


class Target(NamedTuple):
    """A generation of chips."""

    shared_kib: int
    """Shared memory that a block can have (CUDA C++ Programming Guide, compute capabilities)."""
    instruction: str
    """Matrix instruction of this generation in PTX."""


TARGETS = {80: Target(163, "mma.sync"), 90: Target(227, "wgmma"), 100: Target(227, "tcgen05")}
"""Targets by compute capability: A100; H100 and H200; B200."""
MAX_REGISTERS = 255
HEADS = 8
SEGMENTS = 4
KV_HEADS = (8, 2)
"""One number without grouped-query attention, and one with it."""
SEGMENT_LENGTHS = (512, 500)
"""One length that tiles divide, and one that they do not."""
INSTRUCTIONS = {
    "mma.sync": r"\bmma\.sync", "wgmma": r"wgmma\.mma_async", "tcgen05": r"tcgen05\.mma",
}  # fmt: skip
VARIANTS = ("GROUP", "ROTATES", "SIZE", "REVERSE", "DELTA", "NORMALIZED", "TRANSPOSED", "KEEPS")
"""Constants that tell variants of a kernel apart; sizes of tiles do not, as they are tuning."""
TYPES = {
    torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.uint8: "*u8",
}  # fmt: skip


class Case(NamedTuple):
    """A call of Infini-attention on a target, whose generation chooses the tiles."""

    head_dim: int
    rule: str
    kv_heads: int
    segment_length: int
    capability: int
    packed: bool = False
    sliding: bool = False


class Source(NamedTuple):
    """How a kernel's arguments are specialised."""

    signature: dict[str, str]
    constants: dict[tuple[int], Any]
    attributes: dict[tuple[int], Any]


def run(
    json_path: str | None = None,
    is_wanted: Callable[[Case], bool] = lambda case: True,
) -> list[dict[str, Any]]:
    """Compiles the kernels, prints a table, and writes its rows to `json_path` if one is given.

    Args:
        json_path: where to write the rows.
        is_wanted: chooses the calls whose kernels are compiled; all by default.

    Returns:
        One row per distinct kernel and target; `broken` lists the rules that it breaks, and
        `ptxas` has the fields of the assembler.

    Raises:
        UserError: Triton is not installed, or is set to interpret.
        RunError: a kernel breaks a rule.
    """
    if importlib.util.find_spec("triton") is None:
        raise UserError("bench kernels: Triton is not installed: pip install triton")
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise UserError("bench kernels: TRITON_INTERPRET is set; nothing compiles until it is not")
    grid = product(
        TRITON_HEAD_DIMS, KERNEL_RULES, KV_HEADS, SEGMENT_LENGTHS, TARGETS, (False, True),
        (False, True),
    )  # fmt: skip
    cases = [case for case in (Case(*place) for place in grid) if is_wanted(case)]
    jobs = [(*place, users) for place, users in _distinct(cases).items()]
    processes = min(os.cpu_count() or 1, len(jobs))
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        done = pool.map(_row, *zip(*jobs, strict=True))
        rows = list(track(done, "compiling", len(jobs), console=Console(stderr=True)))
    rows.sort(key=lambda row: (row["kernel"], row["head_dim"], _variant(row)))
    _print(rows)
    _print_assemblers(rows)
    write_figures(json_path, rows)
    broken = sum(bool(row["broken"]) for row in rows)
    if broken:
        raise RunError(f"bench kernels: {broken} of {len(rows)} compiled kernels break a rule")
    return rows


@cache
def _recorded(case: Case) -> list[Any]:
    """Records the kernel launches of a forward and a backward call in bf16."""
    from infini_ds.kernels.infini_attention.triton.op import infini_attention_triton
    from infini_ds.kernels.launch import recording

    d, rule, kv_heads, n, capability, packed, sliding = case
    widths = (HEADS, kv_heads, kv_heads)
    qkv = torch.empty(1, SEGMENTS, n, sum(widths), d, dtype=torch.bfloat16, requires_grad=True)
    q, k, v = qkv.split(widths, dim=3)
    memory = RULES[rule].empty(1, kv_heads, d)
    lengths = torch.full((1, SEGMENTS), n, dtype=torch.int32)
    begins = torch.zeros(1, SEGMENTS, n, dtype=torch.int32) if packed else None
    layout = Layout(torch.zeros(1, SEGMENTS, dtype=torch.bool), lengths, begins)
    beta = torch.zeros(HEADS, requires_grad=True)
    table = torch.empty(2 * n if sliding else n, d // 2)
    previous = torch.empty(1, SEGMENTS, n, 2 * kv_heads, d, dtype=q.dtype) if sliding else None
    with recording(capability // 10) as calls:
        inputs = Inputs(q, k, v, None, memory, layout, beta, rule, (table, table), previous)
        out, after = infini_attention_triton(inputs)
        (out.sum() + after.kv.sum() + after.norm.sum()).backward()
    return calls


def _source(call: Any) -> Source:
    """Specialises arguments as at run time: 1 and None are constants, multiples of 16 are known."""
    source = Source({}, {}, {})
    for place, parameter in enumerate(call.kernel.params):
        value = call.arguments[parameter.name]
        kind = "constexpr"
        divisible = False
        if isinstance(value, torch.Tensor):
            kind, divisible = TYPES[value.dtype], value.data_ptr() % 16 == 0
        elif not parameter.is_constexpr and isinstance(value, float):
            kind = "fp32"
        elif not parameter.is_constexpr and value is not None and value != 1:
            kind, divisible = "i32", value % 16 == 0
        source.signature[parameter.name] = kind
        if kind == "constexpr":
            source.constants[(place,)] = value
        if divisible:
            source.attributes[(place,)] = [["tt.divisibility", 16]]
    return source


def _distinct(cases: list[Case]) -> dict[tuple[Case, int], list[Case]]:
    """Maps each distinct kernel, as a case and an index into its launches, to all its cases."""
    places: dict[str, tuple[Case, int]] = {}
    users: dict[tuple[Case, int], list[Case]] = {}
    for case in cases:
        for index, call in enumerate(_recorded(case)):
            key = repr((case.capability, call.kernel.__name__, _source(call), call.options))
            place = places.setdefault(key, (case, index))
            users.setdefault(place, [])
            if case not in users[place]:
                users[place].append(case)
    return users


def _row(case: Case, index: int, users: list[Case]) -> dict[str, Any]:
    """Compiles one kernel, launch `index` of the case; all cases in `users` share it."""
    import triton

    call = _recorded(case)[index]
    row: dict[str, Any] = {
        "kernel": call.kernel.__name__.removesuffix("_kernel"),
        "head_dim": case.head_dim,
        "rules": sorted({user.rule for user in users}),
        "segment_lengths": sorted({user.segment_length for user in users}),
        "constants": {name: value for name, value in call.arguments.items() if name.isupper()},
        "options": call.options,
        "target": f"sm_{case.capability}",
        "triton": triton.__version__,
        "shared_limit": TARGETS[case.capability].shared_kib * 1024,
    }
    # A compiler that crashes ends its process, after it has printed why.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryFile("w+") as messages:
        process = context.Process(
            target=_compile, args=(call, case.capability, sender, messages.fileno())
        )
        process.start()
        sender.close()
        try:
            row |= receiver.recv()
        except EOFError:
            row["broken"] = ["the compiler crashes"]
        process.join()
        if "registers" not in row:
            messages.seek(0)
            row["broken"].append(messages.readline().strip())
    return row


def _compile(call: Any, capability: int, sender: Connection, messages: int) -> None:
    """Sends a row's figures of the machine code; the compiler's output goes to `messages`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from infini_ds.kernels.launch import FUSION

    os.dup2(messages, 2)
    ptxas = {"ptxas": choose_ptxas(capability)._asdict()}
    source, target = ASTSource(call.kernel, *_source(call)), GPUTarget("cuda", capability, 32)
    try:
        compiled = triton.compile(source, target=target, options=call.options | FUSION)
    except Exception as error:  # compilers raise errors of many kinds
        sender.send(ptxas | {"broken": [f"does not compile: {error}"]})
        return
    usage = _resources(compiled.asm["cubin"])
    counts = {
        name: len(re.findall(pattern, compiled.asm["ptx"]))
        for name, pattern in INSTRUCTIONS.items()
    }
    code = {
        "registers": usage["REG"],
        "stack": usage["STACK"] + usage["LOCAL"],
        "shared": compiled.metadata.shared,
        "instructions": {name: count for name, count in counts.items() if count},
        "touched": _touched(compiled.asm["cubin"]) if counts["wgmma"] else [],
    }
    broken = _broken(code, TARGETS[capability], compiled.asm["ttir"], compiled.asm["ttgir"])
    sender.send(ptxas | code | {"broken": list(broken)})


def _broken(code: dict[str, Any], target: Target, ttir: str, ttgir: str) -> Iterator[str]:
    if code["stack"]:
        yield f"spills, stack of {code['stack']}"
    if code["registers"] > MAX_REGISTERS:
        yield f"{code['registers']} registers"
    if code["shared"] > target.shared_kib * 1024:
        yield "too much shared memory"
    used = sorted(code["instructions"])
    if "tt.dot " in ttir and used != [target.instruction]:
        yield f"products by {', '.join(used) or 'none'} and not {target.instruction} alone"
    scalar = re.findall(r"tt\.dot .*-> tensor<[^>]*#blocked", ttgir)
    if scalar:
        yield f"{len(scalar)} products without matrix instructions"
    if touched := code["touched"]:
        yield f"touches registers of running products, {len(touched)} times: {touched[0]}"


def _resources(cubin: bytes) -> dict[str, int]:
    """Returns registers per thread and bytes of memory as the driver will read them."""
    shown = _shown(cubin, "cuobjdump", "-res-usage")
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", shown)}


def _touched(cubin: bytes) -> list[str]:
    """Lists what touches unfinished products; see `unfinished_products`."""
    return unfinished_products.touched(_shown(cubin, "nvdisasm", "-c"))


def _shown(cubin: bytes, tool: str, option: str) -> str:
    """Returns the output of a tool that comes with Triton for the given machine code."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [getattr(knobs.nvidia, tool).path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _variant(row: dict[str, Any]) -> str:
    constants = row["constants"]
    told = [f"{name}={constants[name]}" for name in VARIANTS if name in constants]
    kinds = [kind for kind in ("packed", "sliding") if constants.get(kind.upper())]
    return " ".join((*told, *kinds))


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table(
        title=f"Triton {rows[0]['triton']}: the kernels of Infini-attention in bf16",
        caption="registers of a thread; stack in bytes; shared memory of a block in KiB",
    )
    for heading in ("kernel", "head", "rule", "segment", "tile", "target"):
        table.add_column(heading)
    for heading in ("registers", "stack", "shared", "of"):
        table.add_column(heading, justify="right")
    for heading in ("matrix instructions", "verdict"):
        table.add_column(heading)
    for row in rows:
        constants, options = row["constants"], row["options"]
        tile = "x".join(str(value) for name, value in constants.items() if name.startswith("BLOCK"))
        warps = f", {options['num_warps']} warps, {options['num_stages']} stages" if options else ""
        instructions = [f"{count} {name}" for name, count in row.get("instructions", {}).items()]
        table.add_row(
            f"{row['kernel']} {_variant(row)}",
            str(row["head_dim"]),
            ", ".join(row["rules"]),
            ", ".join(map(str, row["segment_lengths"])),
            tile + warps,
            row["target"],
            str(row.get("registers", "-")),
            str(row.get("stack", "-")),
            f"{row['shared'] / 1024:.1f}" if "shared" in row else "-",
            str(row["shared_limit"] // 1024),
            ", ".join(instructions) or "-",
            "; ".join(row["broken"]) or "ok",
        )
    Console().print(table)


def _print_assemblers(rows: list[dict[str, Any]]) -> None:
    """Prints the assemblers that were used, with warnings about known faults."""
    targets: dict[Ptxas, list[str]] = {}
    for row in rows:
        if "ptxas" in row:
            named = targets.setdefault(Ptxas(**row["ptxas"]), [])
            named += [row["target"]] if row["target"] not in named else []
    for ptxas, names in targets.items():
        print(f"{', '.join(names)}: {ptxas}")
        if ptxas.warning:
            print(f"warning: {ptxas.warning}")
