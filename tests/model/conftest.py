"""Small models whose predictions are spread out enough to tell mistakes from noise."""

from collections.abc import Callable

import pytest
import torch

from infini_ds.config import ModelConfig
from infini_ds.memory import RULES
from infini_ds.model.block import Checkpointing
from infini_ds.model.transformer import InfiniTransformer
from tests import tiny

torch.set_num_threads(1)  # the models are too small for more

MODEL = tiny.model_config(
    vocab_size=61, hidden_size=32, num_heads=4, num_kv_heads=2, initializer_range=0.3
)


@torch.no_grad()
def spread(model: InfiniTransformer) -> None:
    """Write weights from 0 to 1, both ends included, and convolutions that do something."""
    generator, of_keys = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    for name, parameter in model.named_parameters():
        if "key_weight" in name:
            parameter.normal_(0, 0.2, generator=of_keys)
        elif "write_gate" in name or "short_conv" in name:
            parameter.normal_(0, 0.5, generator=generator)
        if "short_conv" in name:
            parameter[:, -1] += 1  # as they start


@pytest.fixture
def make_model() -> Callable[..., InfiniTransformer]:
    def make(activation_checkpointing: Checkpointing = "none", **changes) -> InfiniTransformer:
        config = ModelConfig(**(MODEL.model_dump() | changes))
        model = InfiniTransformer(config, activation_checkpointing=activation_checkpointing)
        spread(model)
        return model

    return make


WRITING = {"write_gate": True, "write_gate_sees_keys": True, "write_penalty": 0.5, "short_conv": 6}
"""Everything on that the model can learn about writing."""


SLIDING = {"use_sliding_window": True, "memory": {"short_conv": 3, "layers": [1]}}


@pytest.fixture(
    params=[{}, {"memory": WRITING}, SLIDING], ids=["plain", "writing", "sliding window"]
)
def options(request) -> dict:
    """Options of the model: all off, all of the memory on, and a sliding window with a memory in
    one of two layers."""
    return request.param


@pytest.fixture(params=RULES)
def rule(request) -> str:
    return request.param


@pytest.fixture
def make_tokens() -> Callable[..., torch.Tensor]:
    def make(batch: int, length: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(MODEL.vocab_size, (batch, length), generator=generator)

    return make
