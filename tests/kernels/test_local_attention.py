"""Local attention on a CPU against a score matrix written out, in outputs and gradients."""

import pytest
import torch

from infini_ds.kernels.local_attention import cpu, op
from infini_ds.kernels.local_attention.cpu import local_attention_cpu

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
