"""Muon beside PyTorch's own, on one device and with the weights cut as ZeRO cuts them."""

import copy
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from infini_ds import InfiniTransformer
from infini_ds.config import ModelConfig, OptimizerConfig, RunConfig
from infini_ds.model.muon import MuonAndAdamW, Shard, make_optimizer, matrices_of
from infini_ds.model.optimizer import parameter_groups
from tests import tiny

CONFIG = OptimizerConfig(
    name="muon", learning_rate=2e-3, weight_decay=0.3, gate_learning_rate_multiplier=5.0,
    eps=1e-6, momentum=0.9, ns_steps=4,
)  # fmt: skip
PROJECTIONS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
STEPS = 5


def model_config(**changes) -> ModelConfig:
    options = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "attention_bias": True}
    memory = {"write_gate": True, "write_gate_sees_keys": True, "short_conv": True}
    return tiny.model_config(**{"vocab_size": 11, **options, "memory": memory, **changes})


def run_config(dtype: str = "bf16") -> RunConfig:
    return tiny.run_config(
        model=model_config().model_dump(), optimizer=CONFIG.model_dump(), train__dtype=dtype
    )


def groups_of(model: InfiniTransformer) -> dict[str, dict]:
    groups = parameter_groups(model.named_parameters(), CONFIG)
    return {group["name"]: group for group in groups}


def train(model: InfiniTransformer, *steps: Callable[[], Any]) -> None:
    tokens = torch.arange(22).view(2, 11) % 11
    for number in range(STEPS):
        model.zero_grad()
        model.loss((tokens * (number + 1)) % 11).backward()
        for step in steps:
            step()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_muon_steps_projections_of_blocks_alone(tied):
    model = InfiniTransformer(model_config(tie_embeddings=tied))
    groups = groups_of(model)
    members = {name: set(map(id, group["params"])) for name, group in groups.items()}
    named = dict(model.named_parameters())
    projections = {n for n in named if n.endswith(tuple(f"{p}.weight" for p in PROJECTIONS))}
    assert len(projections) == 2 * 4
    assert members["weights"] == {id(named[name]) for name in projections}
    assert tied or id(named["layers.4.weight"]) in members["no_decay"]
    decay = {name: group["weight_decay"] for name, group in groups.items()}
    assert decay == {"weights": 0.3, "no_decay": 0.0, "gates": 0.0}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_steps_are_those_of_pytorch_s_muon_and_adamw(dtype, monkeypatch):
    """Where queries, keys, values, gate and up have weights of their own."""
    config = model_config()
    found, plain = (InfiniTransformer(config, seed=3) for _ in range(2))
    if dtype == "fp32":  # PyTorch's rounds to bf16 whatever it is given
        monkeypatch.setattr(Tensor, "bfloat16", Tensor.float)
    own = make_optimizer(
        list(groups_of(found).values()), run_config(dtype), found.named_parameters()
    )
    assert isinstance(own, MuonAndAdamW)
    train(found, own.step)

    groups = groups_of(plain)
    queries, keys = config.num_heads * config.head_dim, config.kv_heads * config.head_dim
    size = config.mlp_size
    rows = {"qkv_proj": [queries, keys, keys], "gate_up_proj": [size, size]}
    whole, parts = [], []
    for name, weight in plain.named_parameters():
        if id(weight) in map(id, groups["weights"]["params"]):
            cut = rows.get(name.split(".")[-2], [len(weight)])
            whole.append(weight)
            parts.append([part.detach().clone() for part in weight.detach().split(cut)])
    muon = torch.optim.Muon(
        [part for weight in parts for part in weight], lr=2e-3, weight_decay=0.3, momentum=0.9,
        ns_steps=4, adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    others = [group for name, group in groups.items() if name != "weights"]
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.95), eps=1e-6, fused=True)

    def step_parts() -> None:
        for weight, own in zip(whole, parts, strict=True):
            gradients = weight.grad.split([len(part) for part in own])
            for part, gradient in zip(own, gradients, strict=True):
                part.grad = gradient
        muon.step()
        for weight, own in zip(whole, parts, strict=True):
            weight.data.copy_(torch.cat(own))

    train(plain, adamw.step, step_parts)
    for (name, weight), other in zip(found.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(weight, other), name


def test_matrices_fill_their_weight():
    config = model_config()
    model = InfiniTransformer(config)
    shapes = {
        name.split(".")[-2]: matrices_of(name, weight, config)
        for name, weight in model.named_parameters()
        if weight.dim() == 2
    }
    hidden, d = config.hidden_size, config.head_dim
    assert shapes["qkv_proj"] == [(4 * d, hidden), (2 * d, hidden), (2 * d, hidden)]
    assert shapes["gate_up_proj"] == [(config.mlp_size, hidden)] * 2
    assert shapes["o_proj"] == [(hidden, 4 * d)]
    assert shapes["down_proj"] == [(hidden, config.mlp_size)]


MATRICES = [(3, 5), (4, 2), (6, 6), (1, 7)]  # 66 numbers


class Holders:
    """Threads that each hold one part of the weights, and sum up tensors together."""

    def __init__(self, count: int):
        self.count, self._barrier = count, threading.Barrier(count, timeout=30)
        self._tensors: list[Tensor] = [torch.empty(0)] * count

    def sum_up(self, index: int, tensor: Tensor) -> None:
        self._tensors[index] = tensor
        self._barrier.wait()
        total = torch.stack(self._tensors).sum(dim=0)
        self._barrier.wait()
        tensor.copy_(total)

    def run(self, work) -> None:
        threads = [threading.Thread(target=work, args=(index,)) for index in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 11, 66])
def test_parts_that_end_inside_matrices_step_as_the_whole(count):
    """Also where a matrix has several holders, and one holds nothing but padding."""
    generator, dtype = torch.Generator().manual_seed(0), torch.bfloat16
    size = 22 if count == 4 else 66 // count
    start, *gradients = torch.randn(1 + STEPS, size * count, generator=generator)
    settings = {"lr": 0.01, "weight_decay": 0.3, "matrices": MATRICES}

    def stepped(start: Tensor, gradients: list[Tensor], shard: Shard | None) -> Tensor:
        weight = torch.nn.Parameter(start.clone())
        optimizer = MuonAndAdamW([{"params": [weight], **settings}], CONFIG, dtype, shard)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        return weight.detach()

    expected = stepped(start, gradients, None)
    holders, found = Holders(count), [torch.empty(0)] * count

    def hold(index: int) -> None:
        mine = slice(index * size, (index + 1) * size)
        shard = Shard(index, partial(holders.sum_up, index))
        found[index] = stepped(start[mine], [gradient[mine] for gradient in gradients], shard)

    holders.run(hold)
    assert torch.equal(torch.cat(found), expected)


def test_saved_states_go_on_bit_for_bit():
    models = [InfiniTransformer(model_config(), seed=3) for _ in range(2)]
    first, second = (
        make_optimizer(list(groups_of(m).values()), run_config(), m.named_parameters())
        for m in models
    )
    train(models[0], first.step)
    models[1].load_state_dict(models[0].state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for model, optimizer in zip(models, (first, second), strict=True):
        train(model, optimizer.step)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)
