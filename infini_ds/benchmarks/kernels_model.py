"""Times whole training steps: one block of an 8B model, and whole models beside the peer's."""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from infini_ds.benchmarks.cuda_timer import Call
from infini_ds.benchmarks.kernels_timing import Timer, seconds_if_it_fits
from infini_ds.benchmarks.peer import PEER
from infini_ds.config import MemoryConfig, ModelConfig
from infini_ds.model.block import Block
from infini_ds.model.flops import (
    device_peak_flops,
    forward_flops_per_token,
    training_flops_per_token,
)
from infini_ds.model.layer_state import empty_state
from infini_ds.model.transformer import InfiniTransformer, full_layout

BLOCK = ModelConfig(
    hidden_size=4096,
    num_layers=1,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
    segment_length=2048,
)
"""One block with the sizes of Llama 3 8B."""
LARGE = ModelConfig(
    vocab_size=32000,
    hidden_size=2048,
    num_layers=16,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=8192,
    segment_length=2048,
    memory_rule="gated_delta",
    memory=MemoryConfig(write_gate=True, write_penalty=0.01, short_conv=4),
    gate_init=-3.5,
)
"""The model of configs/infini_1b.yaml."""
PAPER = ModelConfig(
    vocab_size=32000,
    hidden_size=1024,
    num_layers=12,
    num_heads=8,
    head_dim=128,
    intermediate_size=4096,
    segment_length=2048,
    memory_rule="delta",
)
"""The model of configs/infini_paper.yaml, small enough for what the peer keeps in memory."""
DOCUMENT_WINDOWS = 32
"""Windows of the long document: with 16 segments of 2048 tokens each, 1,048,576 tokens."""


class Models(NamedTuple):
    """Configs of the models that are timed."""

    block: ModelConfig = BLOCK
    large: ModelConfig = LARGE
    paper: ModelConfig = PAPER


class Contestant(NamedTuple):
    """A training step: forward and backward at batch size 1 in bf16, without checkpointing."""

    name: str
    config: ModelConfig
    flops: int
    """FLOPs per token."""
    segments: int
    build: Callable[..., Call]
    once: bool = False
    """Whether a step takes so long that it is timed only once."""


def contestants(models: Models, segments: int) -> list[Contestant]:
    """Returns steps through one window and, last, one of the large model through many windows."""
    block, large, paper = models
    peer = peer_config(paper)
    sliding = large.model_copy(update={"use_sliding_window": True})
    one_block = 3 * forward_flops_per_token(block)[1]
    steps = [
        Contestant("one block of 8B", block, one_block, segments, _block_step),
        *(
            Contestant(name, config, training_flops_per_token(config), segments, _model_step)
            for name, config in (
                ("infini_1b", large), ("infini_1b, sliding window", sliding),
                ("infini_paper", paper), ("infini_paper as the peer's", peer),
            )
        ),
    ]  # fmt: skip
    flops = training_flops_per_token(peer)
    if importlib.util.find_spec("infini_transformer_pytorch") is not None:
        steps.append(Contestant(PEER, peer, flops, segments, _peer_step))
    document = Contestant(
        "infini_1b, a long document", large, training_flops_per_token(large),
        DOCUMENT_WINDOWS * segments, partial(_document_step, window_segments=segments), once=True,
    )  # fmt: skip
    return [*steps, document]


def time_step(contestant: Contestant, device: str, timer: Timer) -> dict[str, Any]:
    """Measures the speed of one contestant."""
    name, config, flops, segments, build, _ = contestant
    torch.manual_seed(0)
    tokens = segments * config.segment_length
    seconds = seconds_if_it_fits(partial(build, config, segments, device), timer)
    peak = device_peak_flops(torch.device(device), "bf16")
    rate = tokens / seconds if seconds is not None else None
    mfu = rate * flops / peak if rate is not None and peak is not None else None
    return {
        "name": name, "tokens": tokens, "seconds": seconds, "tokens_per_second": rate,
        "flops_per_token": flops, "mfu": mfu,
    }  # fmt: skip


def peer_config(model: ModelConfig) -> ModelConfig:
    """Returns our config with the peer's feed-forward and linear memory, which are fixed there."""
    return model.model_copy(
        update={
            "intermediate_size": int(4 * model.hidden_size * 2 / 3),
            "hidden_act": "gelu",
            "mlp_bias": True,
            "head_bias": True,
            "memory_rule": "linear",
        }
    )


def _block_step(config: ModelConfig, segments: int, device: str) -> Call:
    n = config.segment_length
    block = Block(config).to(device, torch.bfloat16)
    hidden = torch.randn(
        1, segments * n, config.hidden_size, device=device, dtype=torch.bfloat16,
        requires_grad=True,
    )  # fmt: skip
    upstream = torch.randn_like(hidden)
    layout = full_layout(1, segments, n, torch.device(device))
    memory = empty_state(config, 1, device)

    def step() -> None:
        block.zero_grad()
        hidden.grad = None
        block(hidden, layout, memory)[0].backward(upstream)

    return step


def _model_step(config: ModelConfig, segments: int, device: str) -> Call:
    model = InfiniTransformer(config).to(device, torch.bfloat16)
    tokens = _tokens(config, segments, device)

    def step() -> None:
        model.zero_grad()
        model.loss(tokens).backward()

    return step


def _document_step(config: ModelConfig, segments: int, device: str, window_segments: int) -> Call:
    model = InfiniTransformer(config).to(device, torch.bfloat16)
    tokens = _tokens(config, segments, device)

    def step() -> None:
        model.zero_grad()
        model.backward(tokens, window_segments=window_segments)

    return step


def _peer_step(config: ModelConfig, segments: int, device: str) -> Call:
    from infini_transformer_pytorch import InfiniTransformer as Peer
    from infini_transformer_pytorch import InfiniTransformerWrapper

    peer = Peer(
        num_tokens=config.vocab_size,
        dim=config.hidden_size,
        depth=config.num_layers,
        dim_head=config.head_dim,
        heads=config.num_heads,
    )
    model = InfiniTransformerWrapper(
        peer.to(device, torch.bfloat16),
        segment_length=config.segment_length,
        detach_mems_every_num_segments=10**9,
    )
    tokens = _tokens(config, segments, device)

    def step() -> None:
        model.zero_grad()
        model(tokens, backward=True)

    return step


def _tokens(config: ModelConfig, segments: int, device: str) -> torch.Tensor:
    return torch.randint(
        config.vocab_size, (1, segments * config.segment_length + 1), device=device
    )
