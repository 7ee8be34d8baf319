"""The tree as docs/architecture.md describes it: arrows one way, and each idea in one place."""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LONGEST = 450
SHORTEST = 40
STANDALONE = "infini_ds/conversion/hf/"
"""Code that is copied into exports; nothing else imports it."""


@functools.cache
def modules() -> dict[str, Path]:
    """Files of the package by the names of their modules."""
    found = {}
    for path in sorted((ROOT / "infini_ds").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports, be it at the top or in a function."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules())
        elif isinstance(node, ast.ImportFrom) and node.module in modules():
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules() else node.module


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Nodes that lead back to themselves, in the order of the walk."""
    found: list[list[str]] = []
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> None:
        if node in path:
            found.append(path[path.index(node) :])
        elif node not in done:
            for other in sorted(arrows.get(node, ())):
                walk(other, [*path, node])
            done.add(node)

    for node in sorted(arrows):
        walk(node, [])
    return found


def package_of(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_file_imports_itself_by_way_of_others():
    arrows = {name: set(imported(path)) - {name} for name, path in modules().items()}
    assert sum(map(len, arrows.values())) > 500, "imports are no longer found"
    assert circles(arrows) == []


def test_no_arrow_between_packages_runs_back_up():
    arrows: dict[str, set[str]] = {}
    for name, path in modules().items():
        own = package_of(name)
        others = {package_of(other) for other in imported(path)}
        arrows.setdefault(own, set()).update(others - {own})
    assert circles(arrows) == []


def test_files_are_neither_long_nor_crumbs():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in modules().values()
        if path.name != "__init__.py"
    }
    long = {name: length for name, length in lengths.items() if length > LONGEST}
    assert long == {}
    short = [name for name, length in lengths.items() if length < SHORTEST]
    assert len(short) <= len(lengths) / 5, short


def test_the_root_is_no_drawer():
    names = {path.name for path in (ROOT / "infini_ds").glob("*.py")}
    assert names == {"__init__.py", "cli.py", "errors.py", "layout.py"}


def names_in(path: Path) -> Iterator[tuple[int, str]]:
    """Attributes and names that a file uses, with their lines."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Name):
            yield node.lineno, node.id


def uses(pattern: str, *allowed: str) -> list[str]:
    """Where names that match are used outside of the allowed folders and files."""
    found = []
    for path in modules().values():
        place = str(path.relative_to(ROOT))
        if not place.startswith((*allowed, STANDALONE)):
            lines = {line for line, name in names_in(path) if re.fullmatch(pattern, name)}
            found += [f"{place}:{line}" for line in sorted(lines)]
    return found


def test_which_rank_this_is_is_asked_in_one_package():
    parallel = "infini_ds/parallel/"
    assert uses("is_(first|last)_stage|stage_id|get_data_parallel_id", parallel) == []
    ranks = ("infini_ds/cluster/", "infini_ds/guard/")
    assert uses("get_rank|get_world_size", parallel, *ranks) == []
    assert uses("get_rank") != [], "nothing would be found"


def test_private_parts_of_deepspeed_are_known_in_one_package():
    own = "infini_ds/parallel/deepspeed/"
    private = {
        name
        for path in modules().values()
        if str(path.relative_to(ROOT)).startswith(own)
        for _, name in names_in(path)
        if name.startswith("_exec") or name in (
            "_config", "_global_grad_norm", "_running_engine_backward", "_local_start",
            "_set_bounds", "_num_layers", "_hp_mapping", "_hp_grad", "fp32_groups_gradients",
            "__compatible_ops__",
        )
    }  # fmt: skip
    assert {"_exec_reduce_grads", "_config", "_local_start"} <= private
    engine = "infini_ds/parallel/pipeline/"
    assert uses("|".join(private - {"_config"}), own) == []
    assert [use for use in uses("_config", own) if use.startswith(engine)] == []


def compares_rules(path: Path) -> list[int]:
    """Lines that compare something with the name of a memory rule."""
    rules = {"linear", "delta", "gated_delta", "gated_delta_dpfp"}
    found = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            inner = [x for side in sides for x in ast.walk(side) if isinstance(x, ast.Constant)]
            named = {constant.value for constant in inner}
            if named & rules and "rope" not in ast.unparse(node) and "llama3" not in named:
                found.append(node.lineno)
    return found


def test_names_of_memory_rules_are_compared_by_memory_and_kernels_alone():
    allowed = ("infini_ds/memory/", "infini_ds/kernels/", STANDALONE)
    found = {
        str(path.relative_to(ROOT)): lines
        for path in modules().values()
        if (lines := compares_rules(path)) and not str(path.relative_to(ROOT)).startswith(allowed)
    }
    assert found == {}
    kernels = ROOT / "infini_ds" / "kernels" / "infini_attention" / "triton" / "paper_window.py"
    assert compares_rules(kernels), "nothing would be found"


@pytest.mark.parametrize("heavy", ["deepspeed", "sentencepiece", "datasets", "transformers"])
def test_the_library_is_light(heavy):
    code = f"import sys; from infini_ds import InfiniTransformer; print({heavy!r} in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "False\n"
