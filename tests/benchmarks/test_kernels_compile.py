"""The machine code of the Triton kernels, compiled here for chips that are not here."""

import importlib.util
import json
import os
import subprocess
import sys
from itertools import product

import pytest

from infini_ds import cli
from infini_ds.benchmarks import kernels_compile
from infini_ds.benchmarks.kernels_compile import INSTRUCTIONS, SEGMENT_LENGTHS, TARGETS

DOTLESS = {"scan", "damping"}
"""Kernels without a matrix product."""
OF_PACKED = {
    "sums", "attend", "read_gradient", "write_gradient", "query_gradient", "key_gradient", "keys",
    "normalized_read_gradient", "earlier_gradient",
}  # fmt: skip
"""Kernels that tell packed segments from others."""
OF_SLIDING = {"attend", "query_gradient"}
"""Kernels that tell sliding windows from others."""


def compiled(tmp_path, is_wanted: str) -> list[dict]:
    """Rows of the command on some `case`s in a process of its own, compiled anew."""
    path = tmp_path / "rows.json"
    code = (
        "from infini_ds.benchmarks import kernels_compile; "
        "from infini_ds.system.exit_code import exit_code; "
        f"wanted = lambda case: {is_wanted}; "
        f"raise SystemExit(exit_code(lambda: kernels_compile.run({str(path)!r}, wanted)))"
    )
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert path.exists(), done.stderr
    rows = json.loads(path.read_text())
    broken = [row for row in rows if row["broken"]]
    assert done.returncode == bool(broken)
    assert not broken, done.stdout
    return rows


def check(rows: list[dict]) -> None:
    for row in rows:
        assert 0 < row["registers"] <= 255
        assert row["stack"] == 0
        assert row["shared"] <= row["shared_limit"]
        capability = int(row["target"].removeprefix("sm_"))
        wanted = TARGETS[capability].instruction
        assert list(row["instructions"]) == ([] if row["kernel"] in DOTLESS else [wanted])


def check_coverage(rows: list[dict], head_dims: set[int], targets: set[str]) -> None:
    kernels = {
        "sums", "scan", "attend", "read_gradient", "write_gradient", "query_gradient",
        "key_gradient", "earlier_gradient", "overlap", "damping", "delta", "delta_gradient",
        "overlap_gradient", "keys", "chunks", "chunks_gradient", "tokens_gradient",
        "normalized_read_gradient", "read_sums",
    }  # fmt: skip
    found = {(row["kernel"], row["head_dim"], row["target"]) for row in rows}
    assert found >= set(product(kernels - {"scan"}, head_dims, targets))
    assert {row["kernel"] for row in rows} == kernels
    groups = {row["constants"]["GROUP"] for row in rows if row["kernel"] == "key_gradient"}
    assert groups == {1, 4}
    for kind, kernels in (("PACKED", OF_PACKED), ("SLIDING", OF_SLIDING)):
        variants = {
            (row["kernel"], row["head_dim"], row["target"])
            for row in rows
            if row["constants"].get(kind)
        }
        assert variants == set(product(kernels, head_dims, targets))


def test_kernels_keep_the_rules_on_hopper(tmp_path):
    wanted = "(case.head_dim, case.capability, case.segment_length) == (128, 90, 500)"
    rows = compiled(tmp_path, wanted)
    check(rows)
    check_coverage(rows, {128}, {"sm_90"})


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("segment_length", SEGMENT_LENGTHS)
def test_kernels_keep_the_rules_on_every_target(tmp_path, segment_length):
    rows = compiled(tmp_path, f"case.segment_length == {segment_length}")
    check(rows)
    check_coverage(rows, {64, 128}, {"sm_80", "sm_90", "sm_100"})


GOOD = {
    "registers": 255, "stack": 0, "shared": 163 * 1024, "instructions": {"mma.sync": 8},
    "touched": [],
}  # fmt: skip
PRODUCT = "%1 = tt.dot %a, %b, %c : tensor<64x64xbf16> -> tensor<64x64xf32, #mma>"


@pytest.mark.parametrize(
    ("change", "ttgir", "broken"),
    [
        ({}, PRODUCT, []),
        ({"stack": 32}, PRODUCT, ["spills, stack of 32"]),
        ({"registers": 256}, PRODUCT, ["256 registers"]),
        ({"shared": 163 * 1024 + 1}, PRODUCT, ["too much shared memory"]),
        (
            {"instructions": {"mma.sync": 1, "wgmma": 8}},
            PRODUCT,
            ["products by mma.sync, wgmma and not mma.sync alone"],
        ),
        ({"instructions": {}}, PRODUCT, ["products by none and not mma.sync alone"]),
        ({}, PRODUCT.replace("#mma", "#blocked2"), ["1 products without matrix instructions"]),
        (
            {"touched": ["R4 is written", "R5 is written"]},
            PRODUCT,
            ["touches registers of running products, 2 times: R4 is written"],
        ),
    ],
    ids=["nothing", "spills", "registers", "shared", "generation", "none", "scalar", "touched"],
)
def test_rule_that_is_broken_is_named(change, ttgir, broken):
    found = kernels_compile._broken(GOOD | change, TARGETS[80], "%1 = tt.dot %a, %b", ttgir)
    assert list(found) == broken


def test_every_target_has_an_instruction_that_is_counted():
    assert {target.instruction for target in TARGETS.values()} == set(INSTRUCTIONS)


def test_missing_triton_is_one_line_with_code_2(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["bench", "kernels", "--compile-only"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("Triton is not installed: pip install triton")


def test_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert cli.main(["bench", "kernels", "--compile-only"]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
