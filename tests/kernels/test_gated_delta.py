"""The gated delta rule against its recurrence by token, and what it is for."""

import pytest
import torch
from torch import Tensor

from infini_ds.kernels.infini_attention.parallel import infini_attention_parallel
from infini_ds.kernels.infini_attention.reference import Inputs, infini_attention_reference
from infini_ds.layout import Layout
from infini_ds.memory import RULES, MemoryState

torch.set_num_threads(1)

NAMES = ("gated_delta", "gated_delta_dpfp")
RULE = RULES["gated_delta"]


def by_token(kv: Tensor, keys: Tensor, weight: Tensor, values: Tensor) -> Tensor:
    """M <- (I - w k^T k) M + w k^T v, one token after another."""
    for t in range(keys.shape[1]):
        k, w, v = keys[:, t], weight[:, t, :, None], values[:, t]
        found = torch.einsum("b h k, b h k v -> b h v", k, kv)
        kv = kv + torch.einsum("b h k, b h v -> b h k v", k, w * (v - found))
    return kv


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [1, 7, 70])
def test_a_segment_is_its_tokens_in_turn(n, name):
    torch.manual_seed(n)
    rule = RULES[name]
    kv = torch.randn(2, 3, rule.feature_size(8), 8, dtype=torch.float64, requires_grad=True)
    k, v = torch.randn(2, 2, n, 3, 8, dtype=torch.float64).unbind()
    w = torch.rand(2, n, 3, dtype=torch.float64)
    leaves = [kv, *(x.requires_grad_() for x in (k, w, v))]
    written = rule.write(MemoryState(kv, kv[..., :0]), rule.features(k), w, v).kv
    expected = by_token(kv, rule.features(k), w, v)
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(written, expected, rtol=0, atol=1e-10)
    gradients = [torch.autograd.grad(x, leaves, upstream) for x in (written, expected)]
    for own, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(own, wanted, rtol=0, atol=1e-10)


@pytest.mark.long
def test_it_is_the_rule_of_transformers():
    """Without decay, Qwen3-Next's plain functions say the same of keys that they normalise."""
    from transformers.models.qwen3_next import modeling_qwen3_next as other

    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 70, 3, 16).unbind()
    w = torch.rand(2, 70, 3)
    kv = torch.randn(2, 3, 16, 16)
    for function in (other.torch_recurrent_gated_delta_rule, other.torch_chunk_gated_delta_rule):
        _, expected = function(
            q, k, v, g=torch.zeros_like(w), beta=w, initial_state=kv,
            output_final_state=True, use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
        written = RULE.write(MemoryState(kv, kv[..., :0]), RULE.features(k), w, v).kv
        torch.testing.assert_close(written, expected, rtol=1e-5, atol=1e-5)


def test_features_of_dpfp_are_products_of_neighbours():
    """x = (3, -2) has the positive parts 3, 0, 0, 2; the first's neighbours are the last three."""
    features = RULES["gated_delta_dpfp"].features(torch.tensor([3.0, -2.0]))
    expected = torch.tensor([6.0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 6.0])
    torch.testing.assert_close(features, expected / expected.norm())


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "function", [infini_attention_reference, infini_attention_parallel], ids=["plain", "parallel"]
)
def test_the_memory_does_not_grow(function, name):
    """100,000 segments of keys that look alike, all written."""
    segments, n, d = 1000, 2, 4
    random = torch.Generator().manual_seed(0)
    memory = RULES[name].empty(1, 1, d)
    layout = Layout(
        torch.zeros(1, segments, dtype=torch.bool),
        torch.full((1, segments), n, dtype=torch.int32),
    )
    rotary = torch.ones(n, d // 2), torch.zeros(n, d // 2)
    sizes = []
    for _ in range(100 if function is infini_attention_parallel else 5):
        k, v = torch.randn(2, 1, segments, n, 1, d, generator=random).unbind()
        inputs = Inputs(k, k + 1, v, None, memory, layout, torch.zeros(1), name, rotary)
        with torch.no_grad():
            _, memory = function(inputs)
        sizes.append(torch.linalg.matrix_norm(memory.kv, 2).item())
    assert max(sizes) < 3 * (sum(sizes) / len(sizes))
    half = len(sizes) // 2
    assert max(sizes[half:]) < 1.5 * max(sizes[:half])


@pytest.mark.parametrize(
    ("name", "pairs", "least", "most"),
    [
        ("gated_delta", 16, 0.95, 1), ("linear", 16, 0, 0.5), ("gated_delta_dpfp", 64, 0.9, 1),
        ("gated_delta", 64, 0, 0.5),
    ],
)  # fmt: skip
def test_pairs_are_told_apart(name, pairs, least, most):
    """Random pairs in a head of 32: the value of a key is nearest to what the key reads."""
    rule, d, documents = RULES[name], 32, 50
    torch.manual_seed(0)
    keys, values = torch.randn(2, documents, pairs, 1, d).unbind()
    features = rule.features(keys)
    memory = rule.write(
        rule.empty(documents, 1, d), features, torch.ones(documents, pairs, 1), values
    )
    found = rule.read(features, memory)[:, :, 0]
    nearest = (found @ values[:, :, 0].mT / values[:, :, 0].norm(dim=-1)[:, None]).argmax(-1)
    right = (nearest == torch.arange(pairs)).float().mean().item()
    assert least <= right <= most
