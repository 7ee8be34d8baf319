"""The seed library's weights: the same function, and the same text."""

from typing import NamedTuple

import pytest
import torch

from infini_ds.config import ModelConfig
from infini_ds.conversion.seed import from_seed, half_order
from infini_ds.model.transformer import InfiniTransformer

seed_library = pytest.importorskip("infini_transformer_pytorch")

torch.set_num_threads(1)  # the models are too small for more

N, HEAD_DIM = 16, 16


class Pair(NamedTuple):
    """The seed's model and ours with the same weights."""

    seed: torch.nn.Module
    ours: InfiniTransformer


def build_seed(rule: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = seed_library.InfiniTransformer(
        num_tokens=64, dim=48, depth=3, dim_head=HEAD_DIM, heads=4,
        use_mem_delta_rule=rule == "delta",
    )  # fmt: skip
    for attention, _ in model.layers:
        torch.nn.init.normal_(attention.fastweight_mem.head_gates)
    return model


@pytest.fixture(params=["linear", "delta"])
def pair(request) -> Pair:
    seed = build_seed(request.param)
    config = ModelConfig(
        vocab_size=64, hidden_size=48, num_layers=3, num_heads=4, head_dim=HEAD_DIM,
        segment_length=N, memory_rule=request.param, hidden_act="gelu", mlp_bias=True,
        head_bias=True, intermediate_size=int(4 * 48 * 2 / 3), norm_eps=1e-30,
    )  # fmt: skip
    ours = InfiniTransformer(config)
    ours.load_state_dict(from_seed(seed.state_dict(), config))
    return Pair(seed, ours)


def read_segments(seed, tokens):
    """Logits of all tokens and the memories after the last whole segment."""
    logits, memories = [], None
    for segment in tokens.split(N, dim=1):
        whole = segment.shape[1] == N
        out = seed(segment, past_memories=memories, return_new_memories=whole)
        logits.append(out.logits)
        memories = out.past_memories if whole else memories
    return torch.cat(logits, dim=1), memories


def relative_error(expected, actual):
    return ((expected - actual).abs().max() / expected.abs().max()).item()


def tokens_of(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(64, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("length", [3, 16, 31, 37, 48, 64, 75, 80])
@torch.no_grad()
def test_logits_and_memories_agree(pair, length):
    tokens = tokens_of(length)
    expected, memories = read_segments(pair.seed, tokens)
    actual = pair.ours(tokens)
    assert relative_error(expected, actual.logits) <= 1e-5
    if memories is None:
        assert (actual.memory.norm == 0).all()
        return
    order = half_order(HEAD_DIM)
    kv = torch.stack([memory.kv_mem[:, :, order] for memory in memories])
    norm = torch.stack([memory.k_norm[:, :, order] for memory in memories])
    assert relative_error(kv, actual.memory.kv) <= 1e-5
    assert relative_error(norm, actual.memory.norm) <= 1e-5


@pytest.mark.parametrize("length", [10, 17, 34, 81])
def test_losses_and_gradients_agree(pair, length):
    tokens = tokens_of(length)
    wrapper = seed_library.InfiniTransformerWrapper(
        pair.seed, segment_length=N, detach_mems_every_num_segments=10**9
    )
    expected = wrapper(tokens, backward=True).detach()
    loss = pair.ours.loss(tokens)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=0)
    # The map of weights is linear, so it maps the gradients too.
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in pair.seed.named_parameters()
    }
    for name, gradient in from_seed(gradients, pair.ours.config).items():
        actual = pair.ours.get_parameter(name).grad
        assert (actual - gradient).norm() <= 1e-4 * gradient.norm() + 1e-9, name


@pytest.mark.parametrize("length", [1, 7, 16])
def test_greedy_text_equals_the_seeds_across_segment_ends(pair, length):
    prompt = tokens_of(length)
    wrapper = seed_library.InfiniTransformerWrapper(pair.seed, segment_length=N)
    expected = wrapper.generate(
        seq_len=length + 3 * N, prompt=prompt, temperature=0.0, filter_fn=lambda t, **_: t
    )
    assert torch.equal(pair.ours.generate(prompt, 3 * N, temperature=0), expected)


def test_greedy_text_after_a_long_prompt(pair):
    """The seed's wrapper forgets all but the last segment of a long prompt; its model does not."""
    prompt = tokens_of(2 * N + 5)
    tokens = prompt
    for _ in range(2 * N):
        with torch.no_grad():
            logits, _ = read_segments(pair.seed, tokens)
        tokens = torch.cat((tokens, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    expected = tokens[:, prompt.shape[1] :]
    assert torch.equal(pair.ours.generate(prompt, 2 * N, temperature=0), expected)
