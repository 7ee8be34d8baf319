"""Registers of matrix products that are still running, in machine code of sm_90."""

import pytest
import triton

from infini_ds.benchmarks import kernels_compile
from infini_ds.benchmarks.kernels_compile import Case
from infini_ds.benchmarks.unfinished_products import touched
from infini_ds.kernels.infini_attention.triton import tuning
from infini_ds.kernels.launch import HOPPER

PRODUCT = "HGMMA.64x64x16.F32.BF16 R24, R64, gdesc[UR4].tnspB, R24, gsb0"
"""Its factor is in R64 to R67, its sum in R24 to R55."""
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"


def code(*lines: str) -> str:
    """As nvdisasm shows it; lines that end with a colon are labels."""
    shown = [".text.kernel:"]
    for number, line in enumerate((*lines, "EXIT")):
        address = f"        /*{16 * number:04x}*/                   "
        shown.append(line if line.endswith(":") else f"{address}{line} ;")
    return "\n".join(shown)


@pytest.mark.parametrize(
    ("instruction", "does"),
    [
        ("FADD R64, R1, R2", "overwrites a factor"),
        ("MOV R67, R1", "overwrites a factor"),
        ("@!P0 MOV R65, R1", "overwrites a factor"),
        ("CS2R R66, SRZ", "overwrites a factor"),
        ("IMAD.WIDE.U32 R63, R1, R2, R3", "overwrites a factor"),
        ("LDG.E.128 R61, desc[UR8][R2.64]", "overwrites a factor"),
        ("LDS.64 R63, [R1+0x10]", "overwrites a factor"),
        ("LDSM.16.M88.4 R62, [R1]", "overwrites a factor"),
        ("SHFL.BFLY PT, R65, R1, 0x1, 0x1f", "overwrites a factor"),
        ("LEA R64, P1, R57, R68, 0x2", "overwrites a factor"),
        ("FFMA R24, R24, R1, RZ", "overwrites an unfinished sum"),
        ("FADD R1, R55.reuse, R2", "reads an unfinished sum"),
        ("ISETP.GE.AND P0, PT, R24, R1, PT", "reads an unfinished sum"),
        ("STG.E.128 desc[UR8][R2.64], R22", "reads an unfinished sum"),
        ("LDG.E R1, desc[UR8][R23.64]", "reads an unfinished sum"),
        (PRODUCT.replace("R24", "R80").replace("R64", "R52"), "reads an unfinished sum"),
    ],
)
def test_touching_a_running_product_is_found(instruction, does):
    (found,) = touched(code(PRODUCT, instruction, WAIT))
    text = instruction.removeprefix("@!P0 ")
    assert found == f"0010 {text} {does}"


@pytest.mark.parametrize(
    "instruction",
    [
        "FADD R1, R64, R67", "MOV R68, R1", "MOV R63, R64", "LDG.E.128 R60, desc[UR8][R2.64]",
        "UMOV UR64, 0x1", "STS.128 [R64], R56", "FCHK P0, R65, R64", "WARPSYNC R64",
        "ISETP.GE.AND P0, PT, R64, R1, PT", "BAR.SYNC.DEFER_BLOCKING 0x0", "CS2R.32 R63, SRZ",
        PRODUCT.replace("R64", "R68"), PRODUCT.replace("R64", "gdesc[UR8]"),
    ],
)  # fmt: skip
def test_what_a_running_product_bears_is_not_found(instruction):
    assert touched(code(PRODUCT, instruction, WAIT)) == []


SECOND = PRODUCT.replace("R64", "R68")
WAIT_FOR_FIRST = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
FACTOR, SECOND_FACTOR = "MOV R64, R1", "MOV R68, R1"


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ((PRODUCT, WAIT, FACTOR), []),
        ((PRODUCT, SECOND, WAIT_FOR_FIRST, FACTOR, WAIT), []),
        ((PRODUCT, SECOND, WAIT_FOR_FIRST, SECOND_FACTOR, WAIT), [SECOND_FACTOR]),
        ((PRODUCT.removesuffix(", gsb0"), SECOND, WAIT_FOR_FIRST, FACTOR, WAIT), [FACTOR]),
        (("MOV R2, R3", ".L_x_1:", FACTOR, PRODUCT, "@P0 BRA `(.L_x_1)", WAIT), [FACTOR]),
        (("MOV R2, R3", ".L_x_1:", FACTOR, PRODUCT, WAIT, "@P0 BRA `(.L_x_1)"), []),
        ((PRODUCT, "@P0 BRA `(.L_x_1)", WAIT, ".L_x_1:", FACTOR), [FACTOR]),
        ((PRODUCT, "BRA.U !UP1, `(.L_x_1)", WAIT, ".L_x_1:", FACTOR), [FACTOR]),
        ((PRODUCT, "BRA `(.L_x_1)", FACTOR, ".L_x_1:", WAIT), []),
        ((PRODUCT, "@P0 EXIT", FACTOR, WAIT), [FACTOR]),
        ((PRODUCT, "EXIT", FACTOR), []),
        ((PRODUCT, "CALL.REL.NOINC `($f)", WAIT, "EXIT", "$f:", FACTOR, "RET.REL.NODEC R2"),
         [FACTOR]),
    ],
    ids=[
        "waited", "first of two", "second of two", "of one group", "next turn", "waited each turn",
        "one way around the wait", "uniform branch", "never reached", "where some go on",
        "after the end", "in a function",
    ],
)  # fmt: skip
def test_every_way_through_the_code_is_followed(lines, found):
    assert [line.split(" ", 1)[1] for line in touched(code(*lines))] == [
        f"{instruction} overwrites a factor" for instruction in found
    ]


@pytest.mark.parametrize("shown", ["", code("MOV R1, R2")], ids=["nothing", "no product"])
def test_code_without_a_product_is_no_good_code(shown):
    with pytest.raises(ValueError, match="no HGMMA"):
        touched(shown)


@pytest.mark.parametrize("stages", [1, 2])
def test_sums_of_grouped_heads_in_two_stages_break_the_rule(monkeypatch, tmp_path, stages):
    """By Triton before 3.9, which keeps products of the loop's last turn running."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setitem(tuning._TILES, ("sums", 128), {HOPPER: tuning.Tiles(64, 64, 8, stages)})
    case = Case(128, "linear", 2, 64 + stages, 90)
    names = [call.kernel.__name__ for call in kernels_compile._recorded(case)]
    row = kernels_compile._row(case, len(names) - 1 - names[::-1].index("sums_kernel"), [case])
    assert row["constants"]["GROUP"] == 4
    old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
    assert bool(row["touched"]) == (stages == 2 and old)
    assert len(row["broken"]) == bool(row["touched"])
    for told in row["broken"]:
        assert told.startswith(f"touches registers of running products, {len(row['touched'])} tim")
