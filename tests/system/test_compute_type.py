"""The type that a machine computes in: by its processor's flags, as Linux names them."""

import io

import pytest
import torch

from infini_ds.model.transformer import InfiniTransformer
from infini_ds.system import compute_type
from infini_ds.system.compute_type import fastest_type, of_processor, place
from infini_ds.system.console import Console
from tests import tiny

AVX2 = "fpu sse4_1 sse4_2 avx f16c fma avx2 bmi2"
AVX512 = f"{AVX2} avx512f avx512dq avx512bw avx512vl avx512cd"
ICE_LAKE = f"{AVX512} avx512_vnni avx512_vbmi2 avx512_bitalg avx512_vpopcntdq"
SAPPHIRE_RAPIDS = f"{ICE_LAKE} avx_vnni avx512_bf16 avx512_fp16"
ARM = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop"
FAMILIES = {
    "Ivy Bridge": ("fpu sse4_1 sse4_2 avx f16c", "fp32"),
    "Haswell": (AVX2, "fp32"),
    "Skylake, desktop": (AVX2, "fp32"),
    "Skylake-SP": (AVX512, "fp32"),
    "Cascade Lake": (f"{AVX512} avx512_vnni", "fp32"),
    "Cooper Lake": (f"{AVX512} avx512_vnni avx512_bf16", "bf16"),
    "Ice Lake-SP": (ICE_LAKE, "fp32"),
    "Sapphire Rapids": (f"{SAPPHIRE_RAPIDS} amx_bf16 amx_tile amx_int8", "bf16"),
    "Sapphire Rapids without AMX": (SAPPHIRE_RAPIDS, "fp32"),
    "Granite Rapids": (f"{SAPPHIRE_RAPIDS} amx_bf16 amx_tile amx_int8 amx_fp16", "bf16"),
    "Alder Lake": (f"{AVX2} avx_vnni", "fp32"),
    "Sierra Forest": (f"{AVX2} avx_vnni avx_ifma avx_vnni_int8 avx_ne_convert", "fp32"),
    "Zen 2": (f"{AVX2} sse4a misalignsse", "fp32"),
    "Zen 3": (f"{AVX2} sse4a vaes vpclmulqdq", "fp32"),
    "Zen 4": (f"{ICE_LAKE} sse4a avx512_bf16", "bf16"),
    "Zen 5": (f"{ICE_LAKE} sse4a avx_vnni avx512_bf16 avx512_vp2intersect", "bf16"),
    "Graviton 2 (Neoverse N1)": (f"{ARM} asimddp ssbs", "fp32"),
    "Graviton 3 (Neoverse V1)": (f"{ARM} asimddp sve i8mm svei8mm bf16 svebf16", "bf16"),
    "Graviton 4 (Neoverse V2)": (f"{ARM} asimddp sve sve2 i8mm bf16 svebf16", "bf16"),
    "Ampere Altra": (f"{ARM} asimddp ssbs", "fp32"),
    "Raspberry Pi 5": (f"{ARM} asimddp", "fp32"),
    "Apple M1, Linux": (f"{ARM} asimddp jscvt fcma", "fp32"),
    "Apple M2, Linux": (f"{ARM} asimddp jscvt fcma i8mm bf16", "bf16"),
    "unknown": ("", "fp32"),
}


@pytest.mark.parametrize(("flags", "dtype"), FAMILIES.values(), ids=FAMILIES)
def test_type_of_a_family_of_processors(flags, dtype):
    chosen = of_processor(flags.split(), onednn=True)
    assert chosen.dtype == dtype
    assert "processor" in chosen.why


@pytest.mark.parametrize(("flags", "dtype"), FAMILIES.values(), ids=FAMILIES)
def test_without_onednn_all_are_faster_in_fp32(flags, dtype):
    """PyTorch for macOS is built without."""
    chosen = of_processor(flags.split(), onednn=False)
    assert chosen.dtype == "fp32"
    assert ("PyTorch does not use" in chosen.why) == (dtype == "bf16")


@pytest.mark.parametrize(
    ("limit", "sapphire_rapids", "zen4"),
    [
        ("", "bf16", "bf16"),
        ("DEFAULT", "bf16", "bf16"),
        ("no such name", "bf16", "bf16"),
        ("SSE41", "fp32", "fp32"),
        ("AVX2", "fp32", "fp32"),
        ("avx2_vnni_2", "fp32", "fp32"),
        ("AVX512_CORE", "fp32", "fp32"),
        ("AVX512_CORE_VNNI", "fp32", "fp32"),
        ("AVX512_CORE_BF16", "fp32", "bf16"),
        ("AVX512_CORE_FP16", "fp32", "bf16"),
        ("AVX10_1_512", "fp32", "bf16"),
        ("AVX512_CORE_AMX", "bf16", "bf16"),
        ("AVX512_CORE_AMX_FP16", "bf16", "bf16"),
    ],
)
def test_what_onednn_may_not_use_does_not_count(limit, sapphire_rapids, zen4):
    for family, dtype in (("Sapphire Rapids", sapphire_rapids), ("Zen 4", zen4)):
        flags, _ = FAMILIES[family]
        assert of_processor(flags.split(), onednn=True, limit=limit).dtype == dtype


def test_the_limit_is_named_as_the_reason():
    flags, _ = FAMILIES["Zen 5"]
    chosen = of_processor(flags.split(), onednn=False, limit="AVX2")
    assert chosen == ("fp32", "oneDNN is held to AVX2, which has no instructions for bf16")


@pytest.mark.parametrize("variable", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_this_machine_heeds_the_limit(variable, monkeypatch):
    monkeypatch.setattr(compute_type, "_flags", lambda: {"avx512_bf16"})
    monkeypatch.setenv(variable, "AVX2")
    assert "held to AVX2" in fastest_type(torch.device("cpu")).why


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 amx_bf16\nbugs\t\t: spectre\n", "fpu avx2 amx_bf16"),
        ("processor\t: 0\nBogoMIPS\t: 243.75\nFeatures\t: fp asimd bf16\n", "fp asimd bf16"),
        ("processor\t: 0\nisa\t\t: rv64imafdc\n", ""),
        ("", ""),
        (None, ""),
    ],
    ids=["x86", "Arm", "RISC-V", "empty", "not Linux"],
)
def test_flags_are_read_as_linux_writes_them(text, flags, tmp_path, monkeypatch):
    file = tmp_path / "cpuinfo"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(compute_type, "_CPUINFO", file)
    assert compute_type._flags() == set(flags.split())


@pytest.mark.parametrize(
    ("flags", "available", "stored", "computed"),
    [
        ("avx2", 1 << 30, torch.bfloat16, torch.float32),
        ("avx512f", 1 << 30, torch.bfloat16, torch.float32),
        ("avx2", 1 << 10, torch.bfloat16, torch.bfloat16),
        ("avx2", 1 << 30, torch.float32, torch.float32),
        ("avx512_bf16", 1 << 30, torch.float32, torch.float32),
    ],
    ids=["AVX2", "AVX-512", "no room", "fp32", "fp32 stays"],
)
def test_a_model_to_read_computes_in_the_faster_type(
    flags, available, stored, computed, monkeypatch
):
    monkeypatch.setattr(compute_type, "_flags", lambda: set(flags.split()))
    monkeypatch.setattr(compute_type, "device_at_hand", lambda: torch.device("cpu"))
    memory = type("Memory", (), {"available": available})
    monkeypatch.setattr(compute_type.psutil, "virtual_memory", lambda: memory)
    model = InfiniTransformer(tiny.model_config(vocab_size=8))
    model.to(stored)
    before = [weight.float() for weight in model.parameters()]
    console = Console()
    console.file = io.StringIO()
    assert place(model, console).type == "cpu"
    after = list(model.parameters())
    assert {weight.dtype for weight in after} == {computed}
    assert all(torch.equal(old, new.float()) for old, new in zip(before, after, strict=True))
    assert ("computes in fp32" in console.file.getvalue()) == (stored != computed)
