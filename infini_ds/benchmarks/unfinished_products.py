"""Finds sm_90 machine code that touches registers of matrix products that are still running.

A product (wgmma in PTX, HGMMA in machine code) keeps running while its warps do other things. Until
WARPGROUP.DEPBAR has waited for it, the registers of its first factor must not be written, and those
of its sum must be neither written nor read (PTX ISA, wgmma.mma_async). The hardware checks neither
rule: code that breaks one computes wrong results, always or only sometimes.
"""

import re
from typing import NamedTuple

_INSTRUCTION = re.compile(
    r"\s*/\*(?P<address>[0-9a-f]+)\*/\s+(?P<predicate>@\S+\s+)?"
    r"(?P<name>[A-Z][\w.]*)\s*(?P<operands>.*?)\s*;"
)
_LABEL = re.compile(r"\s*([\w.$]+):")
_REGISTER = re.compile(r"(?<![\w.])R(\d+)(\.64)?")
_PREDICATE = re.compile(r"!?U?P[T\d]")
_READS_FIRST = {"BAR", "BRX", "CALL", "FCHK", "NANOSLEEP", "RET", "WARPSYNC"}
"""Instructions that read the register in the place where others have their result."""
_FACTOR = 4
"""Registers per thread that hold a product's first factor, whatever its type."""

_MOST = 8
"""Number of groups of products that are told apart; beyond it, the oldest are merged."""


class _Instruction(NamedTuple):
    text: str
    """The instruction with its address."""
    parts: list[str]
    """Parts of its name, which dots separate."""
    operands: list[str]
    written: int
    """Registers that it writes, as bits; likewise below."""
    read: int
    following: list[int]
    """Indices of the instructions that the warp may execute next."""


class _Group(NamedTuple):
    """Products that are waited for together; registers are bits."""

    complete: bool
    factors: int
    sums: int


def touched(code: str) -> list[str]:
    """Finds what writes a factor of an unfinished product, or touches its sum, on any path.

    Args:
        code: machine code of one kernel as `nvdisasm -c` prints it.

    Returns:
        For each such instruction, its text with the address and what it does wrong.

    Raises:
        ValueError: there is no product in the code.
    """
    instructions, entries = _parse(code)
    if not any(_is_product(instruction) for instruction in instructions):
        raise ValueError("no HGMMA in this machine code")
    found: dict[int, str] = {}
    seen: set[tuple[int, tuple[_Group, ...]]] = set()
    ahead: list[tuple[int, tuple[_Group, ...]]] = [(entry, ()) for entry in entries]
    while ahead:
        place = at, running = ahead.pop()
        if place in seen or at == len(instructions):
            continue
        seen.add(place)
        instruction = instructions[at]
        if does := _fault(instruction, running):
            found[at] = f"{instruction.text} {does}"
        after = _running_after(instruction, running)
        ahead += [(following, after) for following in instruction.following]
    return [found[at] for at in sorted(found)]


def _fault(instruction: _Instruction, running: tuple[_Group, ...]) -> str:
    factors = sums = 0
    for group in running:
        factors |= group.factors
        sums |= group.sums
    if _is_product(instruction):  # products run in order, so that one may add to a sum
        return "reads an unfinished sum" if _factor_of(instruction) & sums else ""
    if instruction.written & factors:
        return "overwrites a factor"
    if instruction.written & sums:
        return "overwrites an unfinished sum"
    return "reads an unfinished sum" if instruction.read & sums else ""


def _running_after(instruction: _Instruction, running: tuple[_Group, ...]) -> tuple[_Group, ...]:
    if instruction.parts[:2] == ["WARPGROUP", "DEPBAR"]:
        complete = sum(group.complete for group in running)
        return running[max(complete - int(instruction.operands[-1], 16), 0) :]
    if not _is_product(instruction):
        return running
    groups = list(running)
    group = _Group("gsb0" in instruction.operands, _factor_of(instruction), instruction.written)
    if groups and not groups[-1].complete:
        group = _both(groups.pop(), group)
    if len(groups) == _MOST:  # as in a loop that never waits
        groups[:2] = [_both(*groups[:2])]
    return (*groups, group)


def _both(earlier: _Group, later: _Group) -> _Group:
    return _Group(later.complete, earlier.factors | later.factors, earlier.sums | later.sums)


def _is_product(instruction: _Instruction) -> bool:
    return instruction.parts[0].endswith("GMMA")


def _factor_of(product: _Instruction) -> int:
    return _registers(product.operands[1], _FACTOR)


def _parse(code: str) -> tuple[list[_Instruction], list[int]]:
    """Returns all instructions, and the index of the first one of each section."""
    lines = []
    places: dict[str, int] = {}
    for line in code.splitlines():
        if label := _LABEL.match(line):
            places[label[1]] = len(lines)
        elif instruction := _INSTRUCTION.match(line):
            lines.append(instruction)
    instructions = [_instruction(line, at, places) for at, line in enumerate(lines)]
    return instructions, [at for label, at in places.items() if label.startswith(".text")]


def _instruction(line: re.Match[str], at: int, places: dict[str, int]) -> _Instruction:
    parts = line["name"].split(".")
    operands = [operand.strip() for operand in line["operands"].split(",")]
    written = _written(parts, operands)
    read = 0
    for number, wide in _REGISTER.findall(line["operands"]):
        read |= _span(int(number), 2 if wide else 1)
    if parts[0].startswith("ST"):
        read |= _registers(operands[-1], _width(parts))
    text = f"{line['address']} {line['name']} {line['operands']}".strip()
    return _Instruction(
        text, parts, operands, written, read & ~written, _following(line, at, places)
    )


def _following(line: re.Match[str], at: int, places: dict[str, int]) -> list[int]:
    name = line["name"].split(".")[0]
    target = re.search(r"`\(([\w.$]+)\)$", line["operands"]) if name in ("BRA", "CALL") else None
    # A branch may also depend on an operand before its target.
    goes = name in ("EXIT", "RET") or (name == "BRA" and line["operands"].startswith("`"))
    following = [] if goes and not line["predicate"] else [at + 1]
    return following + ([places[target[1]]] if target else [])


def _written(parts: list[str], operands: list[str]) -> int:
    if parts[0].endswith("GMMA"):
        columns = next(int(part.split("x")[1]) for part in parts if part.startswith("64x"))
        return _registers(operands[0], columns // 2)
    if parts[0] in _READS_FIRST:
        return 0
    result = operands[1] if _PREDICATE.match(operands[0]) and len(operands) > 1 else operands[0]
    return _registers(result, _width(parts))


def _width(parts: list[str]) -> int:
    """Returns the number of registers that an instruction loads, stores or computes."""
    name, *kinds = parts
    if name in ("LDSM", "STSM"):
        return int(kinds[-1]) if kinds[-1].isdigit() else 1
    if name.startswith(("LD", "ST", "ATOM")):
        return 4 if "128" in kinds else 2 if "64" in kinds else 1
    pairs = name in ("DADD", "DMUL", "DFMA", "LEPC") or (name == "CS2R" and "32" not in kinds)
    if name == "HMMA":
        return 4
    return 2 if pairs or "WIDE" in kinds or "64" in kinds else 1


def _registers(operand: str, count: int) -> int:
    """Returns `count` registers from the one an operand names; none if it names no register."""
    register = re.match(r"[-|~!]*R(\d+)", operand)
    return _span(int(register[1]), count) if register else 0


def _span(first: int, count: int) -> int:
    return ((1 << count) - 1) << first
