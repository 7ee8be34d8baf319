"""Sliding windows against attention over the whole text, and against the specification."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infini_ds.kernels.infini_attention import Inputs, infini_attention
from infini_ds.kernels.infini_attention.reference import infini_attention_reference, rotate
from infini_ds.kernels.local_attention import local_attention
from infini_ds.kernels.trial import Trial, make_layout, make_window
from infini_ds.memory import RULES, MemoryState

torch.set_num_threads(1)

HEADS, KV_HEADS, DIM = 6, 2, 16


def table(tokens: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] * 10.0 ** -torch.arange(DIM // 2)
    return angles.cos(), angles.sin()


def test_every_token_attends_to_as_many_tokens_as_a_segment_has():
    """Segment by segment it is what attention over the whole text gives with a band as mask."""
    n, segments = 8, 5
    torch.manual_seed(0)
    q = torch.randn(2, segments, n, HEADS, DIM, dtype=torch.float64)
    k, v = torch.randn(2, 2, segments, n, KV_HEADS, DIM, dtype=torch.float64)
    own = torch.cat((k, v), dim=3)
    previous = torch.cat((torch.zeros_like(own[:, :1]), own[:, :-1]), dim=1)
    actual = local_attention(q, k, v, table(2 * n), previous=previous)

    whole = table(segments * n)
    q, k, v = (x.flatten(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=2) for x in (rotate(k, *whole), v))
    place = torch.arange(segments * n)
    distance = place[:, None] - place
    expected = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (rotate(q, *whole), k, v)),
        attn_mask=(distance >= 0) & (distance < n),
    )
    torch.testing.assert_close(actual.flatten(1, 2), expected.transpose(1, 2))


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("rule", RULES)
def test_sliding_windows_match_the_specification(rule, packed):
    """Outputs, final memory and all gradients, those of the segments before included."""
    n = 24
    window = make_window(Trial(rule, HEADS, KV_HEADS, DIM, n, "fp32", packed))
    layout = make_layout(n, "cpu", packed)
    earlier = torch.randn(
        2, 3, n, 2 * KV_HEADS, DIM, generator=torch.Generator().manual_seed(0)
    ).masked_fill(layout.starts[..., None, None, None], 0)
    earlier[0, 0, : n // 2] = 0  # a document that began inside the segment before

    def results(function, dtype: torch.dtype) -> list[Tensor]:
        tensors = (window.qkv, window.w, *window.memory, window.beta, earlier)
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        qkv, w, kv, norm, beta, previous = leaves
        q, k, v = qkv.split((HEADS, KV_HEADS, KV_HEADS), dim=3)
        rotary = tuple(x.to(dtype) for x in table(2 * n))
        memory = MemoryState(kv, norm)
        out, after = function(
            Inputs(q, k, v, w, memory, layout, beta, rule, rotary, previous)  # type: ignore
        )
        found = [out, *after]
        upstream = [x.to(dtype) for x in window.upstream]
        return [*found, *torch.autograd.grad(found, leaves, upstream)]

    expected = results(infini_attention_reference, torch.float64)
    actual = results(infini_attention, torch.float32)
    for want, have in zip(expected, actual, strict=True):
        error = (have.double() - want).norm()
        assert error <= 1e-5 * want.norm()
