"""Local attention on a CPU against a score matrix written out, in outputs and gradients."""

import pytest
import torch

from infini_ds.kernels.local_attention import cpu, op, runs
from infini_ds.kernels.local_attention.cpu import local_attention_cpu
from infini_ds.kernels.trial import begins_of

DIM = 16


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def written_out(q, k, v, cos, sin):
    def rotate(x):
        first, second = x.chunk(2, dim=-1)
        c, s = cos[:, None], sin[:, None]
        return torch.cat((first * c - second * s, second * c + first * s), dim=-1)

    n, group = q.shape[2], q.shape[3] // k.shape[3]
    k, v = (x.repeat_interleave(group, dim=3) for x in (rotate(k), v))
    scores = torch.einsum("b s i h d, b s j h d -> b s h i j", rotate(q), k) / DIM**0.5
    future = torch.ones(n, n, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
    return torch.einsum("b s h i j, b s j h d -> b s i h d", weights, v)


def compute(function, inputs, dtype, table_dtype):
    q, k, v = (x.to(dtype).requires_grad_() for x in inputs[:3])
    cos, sin = (x.to(table_dtype) for x in inputs[3:])
    out = function(q, k, v, cos, sin)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    out.backward(upstream.to(dtype))
    return [out, q.grad, k.grad, v.grad]


def make_inputs(n, group, sharpness=1.0):
    """q, k, v as slices of one projection, and rotary tables; all exact in bf16 but the tables."""
    generator = torch.Generator().manual_seed(n)
    heads = 2 * group
    qkv = torch.randn(2, 2, n, heads + 4, DIM, generator=generator) * sharpness
    angle = torch.arange(n)[:, None] * 10.0 ** -torch.arange(DIM // 2)
    return [*qkv.bfloat16().float().split((heads, 2, 2), dim=3), angle.cos(), angle.sin()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("tile", [16, 128])
@pytest.mark.parametrize("n", [1, 7, 16, 63, 100])
def test_local_attention_matches_written_out(n, tile, group, precision, monkeypatch):
    monkeypatch.setattr(cpu, "FORWARD_TILE", tile)
    monkeypatch.setattr(cpu, "BACKWARD_TILE", tile)
    inputs = make_inputs(n, group)
    expected = compute(written_out, inputs, torch.float64, torch.float64)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    actual = compute(local_attention_cpu, inputs, dtype, torch.float32)
    limit = {"fp32": 1e-5, "bf16": 8e-3}[precision]
    for name, want, have in zip(("out", "dq", "dk", "dv"), expected, actual, strict=True):
        # A token that attends to itself alone: its queries and keys have no gradient.
        scale = want.norm().clamp(min=1)
        assert (want - have.double()).norm() <= limit * scale, name


def test_scores_are_fp32_in_bf16_computation():
    """Scores near 50: rounded to bf16 they would be off by an eighth, and weights by as much."""
    inputs = make_inputs(64, 1, sharpness=3.5)
    expected = compute(written_out, inputs, torch.float64, torch.float64)
    actual = compute(local_attention_cpu, inputs, torch.bfloat16, torch.float32)
    plain = compute(plain_sdpa, inputs, torch.bfloat16, torch.float32)
    for want, have, usual in zip(expected, actual, plain, strict=True):
        ours, pytorchs = ((x.double() - want).norm() for x in (have, usual))
        assert ours <= 1.1 * pytorchs


def plain_sdpa(q, k, v, cos, sin):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 2)
        return op.local_attention(q, k, v, (cos, sin))


def test_long_attention_never_holds_a_score_matrix():
    """At most a tile of scores: the largest tensor made is far below n x n."""
    from torch.utils._python_dispatch import TorchDispatchMode

    n, sizes = 1024, []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, tuple) else (out,))
                         if isinstance(x, torch.Tensor))  # fmt: skip
            return out

    q, k, v = (torch.randn(1, 1, n, 1, DIM, requires_grad=True) for _ in range(3))
    with Sizes():
        local_attention_cpu(q, k, v, torch.ones(n, 8), torch.zeros(n, 8)).sum().backward()
    assert max(sizes) <= cpu.BACKWARD_TILE * n


def begins_of_lengths(n: int, *segments: list[int]) -> torch.Tensor:
    """Layout.begins [1, segments, n] of documents of these lengths, one behind the other."""
    ends = [torch.tensor(lengths).cumsum(0).tolist() for lengths in segments]
    return torch.stack([begins_of(n, own) for own in ends])[None]


LENGTHS = [
    [64], [63, 1], [1] * 64, [1, 62, 1], [20, 20], [3, 3, 30, 3, 3], [31, 1, 32], [32, 1, 31], [],
]  # fmt: skip


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_runs_hold_whole_documents_and_all_rows(lengths, monkeypatch):
    monkeypatch.setattr(runs, "SHORT", 10)
    monkeypatch.setattr(runs, "TOGETHER", 20)
    begins = begins_of_lengths(64, lengths)
    (found,) = runs.runs_of(begins)
    own = torch.minimum(begins[0, 0], torch.arange(64))
    place = 0
    for run in found:
        assert run.start == place < run.end
        place = run.end
        firsts = own[run.start : run.end].unique()
        assert firsts[0] == run.start
        if run.begins is None:
            assert len(firsts) == 1
        else:
            assert run.end - run.start <= 20
            assert torch.equal(run.begins, own[run.start : run.end] - run.start)
    assert place == 64
    documents = sorted({*own.tolist()})
    long = [first for first in documents if (own == first).sum() >= 10]
    assert long == [run.start for run in found if run.end - run.start >= 10 and run.begins is None]


def attend(function, inputs, begins, **changes):
    """Outputs and gradients of packed segments."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changes.items():
            patch.setattr(op, name, value)
        return compute(
            lambda q, k, v, cos, sin: function(q, k, v, (cos, sin), begins),
            inputs, torch.float32, torch.float32,
        )  # fmt: skip


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(("masked", "long"), [(64, 512), (8, 512), (8, 8)])
def test_documents_of_a_segment_attend_as_if_alone(group, masked, long):
    """With rotary positions of their own."""
    n = 96
    inputs = make_inputs(n, group)
    begins = begins_of_lengths(n, [70, 26], [5, 67, 20]).expand(2, 2, n).contiguous()
    packed = attend(op.local_attention, inputs, begins, MASKED=masked, LONG=long)[0]
    for s, first, end in ((0, 0, 70), (0, 70, 96), (1, 0, 5), (1, 5, 72), (1, 72, 92)):
        own = [x.detach()[:, s : s + 1, first:end] for x in inputs[:3]]
        own += [x[: end - first] for x in inputs[3:]]
        alone = compute(written_out, own, torch.float64, torch.float64)[0]
        torch.testing.assert_close(packed[:, s : s + 1, first:end], alone.float())


def test_segments_of_one_document_are_one_call(monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(args[0].shape)
        return attention(*args, **kwargs)

    attention = op.F.scaled_dot_product_attention
    monkeypatch.setattr(op.F, "scaled_dot_product_attention", counted)
    monkeypatch.setattr(op, "MASKED", 8)
    q = torch.randn(2, 3, 96, 2, DIM)
    rotary = torch.ones(96, DIM // 2), torch.zeros(96, DIM // 2)
    whole, packed = [96], [70, 26]
    begins = begins_of_lengths(96, whole, whole, packed, whole, whole, whole).view(2, 3, 96)
    op.local_attention(q, q, q, rotary, begins)
    assert calls == [(2, 2, 96, DIM), (1, 2, 70, DIM), (1, 2, 26, DIM), (3, 2, 96, DIM)]
    calls.clear()
    nothing = op.local_attention(q, q, q, rotary, torch.zeros_like(begins))
    assert torch.equal(nothing, op.local_attention(q, q, q, rotary))
    assert calls == [(6, 2, 96, DIM)] * 2


@pytest.mark.parametrize("long", [512, 4096])
def test_packed_attention_never_holds_more_scores_than_documents_have(long, monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    n, sizes = 1024, []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, tuple) else (out,))
                         if isinstance(x, torch.Tensor))  # fmt: skip
            return out

    monkeypatch.setattr(op, "LONG", long)
    begins = begins_of_lengths(n, [100] * 9 + [1] * 124)
    q, k, v = (torch.randn(1, 1, n, 1, DIM, requires_grad=True) for _ in range(3))
    rotary = torch.ones(n, DIM // 2), torch.zeros(n, DIM // 2)
    with Sizes():
        op.local_attention(q, k, v, rotary, begins).sum().backward()
    assert max(sizes) <= max(128**2, n * (DIM + cpu.TERMS))
