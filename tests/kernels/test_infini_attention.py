"""Infini-attention against its specification: outputs, final memory and every gradient."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from infini_ds.kernels.infini_attention import Inputs, infini_attention, segment_overlaps
from infini_ds.kernels.infini_attention.reference import infini_attention_reference
from infini_ds.kernels.local_attention import op
from infini_ds.kernels.trial import Trial, error, make_window, results
from infini_ds.layout import Layout
from infini_ds.memory import RULES, MemoryState, delta
from infini_ds.memory.delta import delta_damping
from infini_ds.memory.rule import sigma

torch.set_num_threads(1)

DIM = 16
NAMES = ("out", "kv", "norm", *(f"gradient of {name}" for name in ("q", "k", "v", "incoming kv",
         "incoming norm", "beta", "w")))  # fmt: skip

# starts and lengths of 2 lanes; a length above 0 stands for that share of a segment.
LAYOUTS = {
    "carried memory": ([[0, 0, 0, 0]] * 2, [[1, 1, 1, 1]] * 2),
    "empty memory": ([[1, 0, 0, 0]] * 2, [[1, 1, 1, 1]] * 2),
    "mid-window starts": ([[0, 0, 1, 0], [1, 0, 0, 1]], [[1, 1, 1, 1]] * 2),
    "padding": ([[0, 0, 1, 1], [0, 1, 0, 0]], [[1, 0.4, 0.2, 1], [0.6, 1, 1, 0.5]]),
    "segments without tokens": ([[0, 1, 0, 1], [1, 0, 0, 0]], [[0, 1, 0, 1], [0, 0, 0, 0]]),
    "one segment": ([[0], [1]], [[1], [0.5]]),
}


class Result(NamedTuple):
    outputs: list[Tensor]
    gradients: list[Tensor]


def make_layout(name: str, n: int) -> Layout:
    starts, shares = LAYOUTS[name]
    lengths = (torch.tensor(shares) * n).ceil().int()
    return Layout(torch.tensor(starts, dtype=torch.bool), lengths)


def make_inputs(
    layout: Layout, n: int, group: int, gated: bool, rule: str = "linear"
) -> list[Tensor]:
    """q, k, v, incoming kv and norm, beta, and w if gated; exact in bf16 but for the memory."""
    torch.manual_seed(n)
    batch, segments = layout.starts.shape
    kv_heads = 2
    shape = (batch, segments, n, kv_heads)
    q = torch.randn(*shape[:3], group * kv_heads, DIM)
    k, v = torch.randn(*shape, DIM), torch.randn(*shape, DIM)
    stored_k, stored_v = torch.randn(2, 2, kv_heads, n, DIM)
    stored_k = RULES[rule].features(stored_k)
    norm = stored_k.sum(-2)[..., : DIM if RULES[rule].divides else 0]
    beta = torch.randn(group * kv_heads)
    w = [torch.rand(shape).bfloat16().float()] if gated else []
    exact = [x.bfloat16().float() for x in (q, k, v)]
    return [*exact, stored_k.mT @ stored_v, norm, beta.bfloat16().float(), *w]


def compute(
    function, inputs: list[Tensor], layout: Layout, rule: str, dtype, state, device="cpu"
) -> Result:
    dtypes = (dtype, dtype, dtype, state, state, state, dtype)
    leaves = [
        x.to(device, kind).requires_grad_()
        for x, kind in zip(inputs, dtypes[: len(inputs)], strict=True)
    ]
    q, k, v, kv, norm, beta, *gate = leaves
    w = gate[0] if gate else None
    n = q.shape[2]
    angle = torch.arange(n)[:, None] * 10.0 ** -torch.arange(DIM // 2)
    rotary = angle.cos().to(device, state), angle.sin().to(device, state)
    layout = layout.map(lambda part: part.to(device))
    memory = MemoryState(kv, norm)
    out, memory = function(Inputs(q, k, v, w, memory, layout, beta, rule, rotary))
    torch.manual_seed(1)
    outputs = [out, memory.kv, memory.norm]
    upstream = [torch.randn(x.shape).bfloat16().to(x) for x in outputs]
    return Result(outputs, list(torch.autograd.grad(outputs, leaves, upstream)))


def error_ratio(expected: Tensor, actual: Tensor) -> float:
    expected, actual = expected.double().cpu(), actual.double().cpu()
    scale = expected.norm()
    return ((expected - actual).norm() / scale if scale > 0 else actual.norm()).item()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout_name", LAYOUTS)
@pytest.mark.parametrize("n", [7, 63])
@pytest.mark.parametrize(("group", "gated"), [(1, False), (3, True)], ids=["mha", "gqa-gated"])
@pytest.mark.parametrize("rule", RULES)
def test_infini_attention_matches_reference(rule, group, gated, n, layout_name, precision):
    layout = make_layout(layout_name, n)
    inputs = make_inputs(layout, n, group, gated, rule)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    expected = compute(
        infini_attention_reference, inputs, layout, rule, torch.float64, torch.float64
    )
    actual = compute(infini_attention, inputs, layout, rule, dtype, torch.float32)
    limits = {"fp32": (1e-5, 1e-5), "bf16": (5e-3, 8e-3)}[precision]
    for expected_part, actual_part, limit in zip(expected, actual, limits, strict=True):
        names = NAMES[:3] if expected_part is expected.outputs else NAMES[3:]
        for name, want, have in zip(names, expected_part, actual_part, strict=False):
            # A sum over all tokens whose terms largely cancel, in bf16 more than they round.
            slack = 3 if name == "gradient of beta" else 1
            assert error_ratio(want, have) <= slack * limit, name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("n", [24, 272])
@pytest.mark.parametrize(
    ("masked", "long"), [(512, 512), (8, 512), (8, 16)], ids=["mask", "runs", "tiles"]
)
@pytest.mark.parametrize("rule", RULES)
def test_packed_segments_match_reference(rule, masked, long, n, precision, monkeypatch):
    monkeypatch.setattr(op, "MASKED", masked)
    monkeypatch.setattr(op, "LONG", long)
    trial = Trial(rule, 6, 2, DIM, n, precision, packed=True)
    window = make_window(trial)
    expected = results(
        infini_attention_reference, trial, window, "cpu", torch.float64, torch.float64
    )
    dtype, limit = {"fp32": (torch.float32, 1e-5), "bf16": (torch.bfloat16, 8e-3)}[precision]
    actual = results(infini_attention, trial, window, "cpu", dtype)
    for name, want in expected.items():
        slack = 3 if name == "gradient of beta" else 1
        assert error(want, actual[name]) <= slack * limit, name


def test_memory_stays_fp32_in_bf16_computation():
    layout = make_layout("carried memory", 7)
    result = compute(
        infini_attention, make_inputs(layout, 7, 1, False), layout, "linear",
        torch.bfloat16, torch.float32,
    )  # fmt: skip
    assert [x.dtype for x in result.outputs] == [torch.bfloat16, torch.float32, torch.float32]


def test_segment_sums_are_accumulated_in_fp32():
    """4,096 equal writes: a sum rounded to bf16 on the way would stop growing at 256."""
    n = 4096
    layout = Layout(torch.ones(1, 1, dtype=torch.bool), torch.full((1, 1), n, dtype=torch.int32))
    q = torch.zeros(1, 1, n, 1, 2, dtype=torch.bfloat16)
    v = torch.full_like(q, 1 + 2**-7)
    rotary = torch.ones(n, 1), torch.zeros(n, 1)
    memory = RULES["linear"].empty(1, 1, 2)
    _, memory = infini_attention(
        Inputs(q, q, v, None, memory, layout, torch.zeros(1), "linear", rotary)
    )
    torch.testing.assert_close(memory.norm, torch.full((1, 1, 2), float(n)))
    torch.testing.assert_close(memory.kv, torch.full((1, 1, 2, 2), n * (1 + 2**-7)))


@pytest.mark.parametrize("rule", RULES)
def test_inputs_without_gradient_get_none(rule):
    """Memories of a window's start have none, and frozen projections may have none either."""
    layout = make_layout("mid-window starts", 7)
    q, k, v, kv, norm, beta = make_inputs(layout, 7, 1, False, rule)
    rotary = torch.ones(7, DIM // 2), torch.zeros(7, DIM // 2)
    for chosen in (q, k, v, beta):
        chosen.requires_grad_()
        out, memory = infini_attention(
            Inputs(q, k, v, None, MemoryState(kv, norm), layout, beta, rule, rotary)
        )
        (out.sum() + memory.kv.sum() + memory.norm.sum()).backward()
        assert chosen.grad is not None
        assert chosen.grad.isfinite().all()
        chosen.requires_grad_(False).grad = None


class Writes(NamedTuple):
    """What the segments of one document write, [1, n, kv_heads, d] each."""

    k: list[Tensor]
    v: list[Tensor]
    lengths: list[int]


def memory_norms(function, writes: Writes) -> list[tuple[float, float]]:
    """Spectral norm of the memory after each segment, and the sum of norms that bounds it."""
    memory = RULES["delta"].empty(1, 1, DIM)
    n = writes.k[0].shape[1]
    rotary = torch.ones(n, DIM // 2), torch.zeros(n, DIM // 2)
    norms = []
    for k, v, length in zip(*writes, strict=True):
        layout = Layout(torch.zeros(1, 1, dtype=torch.bool), torch.tensor([[length]]))
        before = torch.linalg.matrix_norm(memory.kv, 2).item()
        q = k[:, None]
        beta = torch.zeros(1)
        _, memory = function(
            Inputs(q, k[:, None], v[:, None], None, memory, layout, beta, "delta", rotary)
        )
        valid = (torch.arange(n) < length)[:, None]
        added = (sigma(k[0, :, 0]) * valid).mT @ v[0, :, 0]
        bound = before + torch.linalg.matrix_norm(added, 2).item()
        norms.append((torch.linalg.matrix_norm(memory.kv, 2).item(), bound))
    return norms


def repetitive_writes(lengths: list[int], n: int) -> Writes:
    """Segments whose keys look alike, so that each reads back what was stored over and over."""
    torch.manual_seed(0)
    base = torch.randn(1, 1, 1, DIM)
    keys = [base + 0.3 * torch.randn(1, n, 1, DIM) for _ in lengths]
    return Writes(keys, [torch.randn(1, n, 1, DIM) for _ in lengths], lengths)


@pytest.mark.parametrize(
    "function", [infini_attention_reference, infini_attention], ids=["reference", "parallel"]
)
def test_delta_guard_bounds_memory_after_short_first_segment(function, monkeypatch):
    writes = repetitive_writes([2, 64, 64, 64], n=64)
    assert all(norm <= bound * (1 + 1e-5) for norm, bound in memory_norms(function, writes))

    def undamped(overlap, norm, added_norm):
        return torch.ones(norm.shape[:-1])

    monkeypatch.setattr(delta, "delta_damping", undamped)
    monkeypatch.setattr(segment_overlaps, "delta_damping", undamped)
    amplified = max(norm / bound for norm, bound in memory_norms(function, writes))
    assert amplified > 2, "the case no longer shows what the guard is for"


def overlap(k: Tensor, norm: Tensor) -> Tensor:
    return (k / (k @ norm[..., None])).mT @ k


def test_delta_guard_is_exactly_one_for_equal_segments():
    torch.manual_seed(0)
    k = sigma(torch.randn(8, 4, 2, 64, DIM))  # [batch, segments, kv_heads, n, d]
    added = k.sum(-2)
    for s in range(1, 4):
        norm = added[:, :s].sum(1)
        damping = delta_damping(overlap(k[:, s], norm), norm, added[:, s])
        assert torch.equal(damping, torch.ones_like(damping))


def test_delta_guard_is_zero_where_nothing_is_stored():
    k = sigma(torch.randn(1, 1, 8, DIM))
    nothing = torch.zeros(1, 1, DIM)
    assert delta_damping(overlap(k, nothing + 1e-12), nothing, k.sum(-2)).item() == 0
