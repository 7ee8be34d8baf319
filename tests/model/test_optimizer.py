import itertools

import pytest
import torch

from infini_ds import InfiniTransformer
from infini_ds.config import OptimizerConfig
from infini_ds.model.optimizer import (
    adamw,
    learning_rate_factor,
    parameter_groups,
    set_learning_rate,
    write_penalty_factor,
)
from tests import tiny

CONFIG = OptimizerConfig(
    learning_rate=2e-3, weight_decay=0.3, gate_learning_rate_multiplier=5.0, beta1=0.8, eps=1e-6
)


def model(**changes) -> InfiniTransformer:
    config = tiny.model_config(
        vocab_size=11, num_layers=2, attention_bias=True, mlp_bias=True, qk_norm=True, **changes
    )
    return InfiniTransformer(config)


def groups_of(module: InfiniTransformer) -> dict[str, dict]:
    groups = parameter_groups(module.named_parameters(), CONFIG)
    return {group["name"]: group for group in groups}


def names_in(module: InfiniTransformer, group: dict) -> set[str]:
    members = set(map(id, group["params"]))
    return {name for name, p in module.named_parameters() if id(p) in members}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_parameter_groups_are_by_kind(tied):
    module = model(tie_embeddings=tied)
    groups = groups_of(module)
    names = {name for name, _ in module.named_parameters()}
    gates = {name for name in names if name.endswith("beta")}
    assert len(gates) == 2
    assert names_in(module, groups["gates"]) == gates
    no_decay = {n for n in names if "norm" in n or n.endswith("bias") or n == "layers.0.weight"}
    no_decay.add("layers.3.weight")  # the final norm
    assert names_in(module, groups["no_decay"]) == no_decay
    assert names_in(module, groups["weights"]) == names - gates - no_decay
    assert ("layers.4.weight" in names_in(module, groups["weights"])) == (not tied)


def test_write_gates_and_convolutions_have_no_decay_and_the_ordinary_learning_rate():
    module = model(memory={"write_gate": True, "write_gate_sees_keys": True, "short_conv": True})
    names = {n for n, _ in module.named_parameters() if "write_gate" in n or "short_conv" in n}
    assert len(names) == 2 * 4
    assert names <= names_in(module, groups_of(module)["no_decay"])


def test_parameter_groups_hold_every_parameter_once():
    module = model(tie_embeddings=True)
    members = itertools.chain(*(group["params"] for group in groups_of(module).values()))
    assert sorted(map(id, members)) == sorted(id(p) for p in module.parameters())


def test_only_weights_decay_and_gates_have_a_learning_rate_of_their_own():
    groups = groups_of(model())
    decay = {name: group["weight_decay"] for name, group in groups.items()}
    assert decay == {"weights": 0.3, "no_decay": 0.0, "gates": 0.0}
    peaks = {name: group["peak_lr"] for name, group in groups.items()}
    assert peaks == pytest.approx({"weights": 2e-3, "no_decay": 2e-3, "gates": 1e-2})


def test_empty_groups_are_dropped():
    norm = torch.nn.RMSNorm(4)
    groups = parameter_groups(norm.named_parameters(), CONFIG)
    assert [group["name"] for group in groups] == ["no_decay"]


def test_what_is_not_trained_is_in_no_group_and_what_stands_still_does_not_decay():
    module = model()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.endswith("down_proj.weight"))
    (group,) = parameter_groups(module.named_parameters(), CONFIG)
    assert names_in(module, group) == {f"layers.{block}.mlp.down_proj.weight" for block in (1, 2)}
    assert group["weight_decay"] == 0.3
    still = {"layers.2.mlp.down_proj.weight"}
    (group,) = parameter_groups(module.named_parameters(), CONFIG, still)
    assert group["weight_decay"] == 0.0


def test_adamw_has_the_settings_and_a_step_changes_every_group():
    module = model()
    optimizer = adamw(list(groups_of(module).values()), CONFIG)
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-6)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    module.loss(torch.arange(22).view(2, 11) % 11).backward()
    optimizer.step()
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(before)


@pytest.mark.parametrize("shape", [(7,), (5, 33), (64, 64)], ids=str)
def test_adamw_steps_as_pytorch_s_plain_one(shape):
    generator = torch.Generator().manual_seed(0)
    found, expected = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    group = {"weight_decay": 0.3, "lr": 0.01}
    ours = adamw([{"params": [found], **group}], CONFIG)
    plain = torch.optim.AdamW(
        [{"params": [expected], **group}], betas=(0.8, 0.95), eps=1e-6, foreach=False
    )
    for _ in range(5):
        found.grad = torch.randn(shape, generator=generator)
        expected.grad = found.grad.clone()
        ours.step()
        plain.step()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_set_learning_rate_scales_each_group_s_peak():
    optimizer = adamw(list(groups_of(model()).values()), CONFIG)
    for factor in (0.5, 0.1):  # from the peak each time, not from the last value
        set_learning_rate(optimizer, factor)
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        expected = {"weights": 2e-3, "no_decay": 2e-3, "gates": 1e-2}
        assert rates == pytest.approx({name: peak * factor for name, peak in expected.items()})


@pytest.mark.parametrize(
    ("settings", "step", "expected"),
    [
        pytest.param({}, 0, 0.1, id="first_warm_up_step"),
        pytest.param({}, 4, 0.5, id="middle_of_warm_up"),
        pytest.param({}, 9, 1.0, id="last_warm_up_step"),
        pytest.param({}, 10, 1.0, id="cosine_begins_at_the_peak"),
        pytest.param({}, 60, 0.6, id="middle_of_the_cosine"),
        pytest.param({}, 110, 0.2, id="cosine_ends_at_the_floor"),
        pytest.param({}, 500, 0.2, id="cosine_stays_at_the_floor"),
        pytest.param({"warmup_steps": 0}, 0, 1.0, id="no_warm_up"),
        pytest.param({"schedule": "wsd"}, 87, 1.0, id="wsd_is_stable"),
        pytest.param({"schedule": "wsd"}, 88, 1.0, id="wsd_decay_begins_a_fifth_before_the_end"),
        pytest.param({"schedule": "wsd"}, 99, 0.6, id="wsd_in_the_middle_of_its_decay"),
        pytest.param({"schedule": "wsd"}, 110, 0.2, id="wsd_ends_at_the_floor"),
        pytest.param({"schedule": "wsd", "decay_steps": 40}, 90, 0.6, id="wsd_given_decay"),
    ],
)
def test_learning_rate_factor_at(settings, step, expected):
    base = {"warmup_steps": 10, "min_learning_rate_ratio": 0.2}
    config = OptimizerConfig(**(base | settings))
    assert learning_rate_factor(step, 110, config) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_learning_rate_factor_never_rises_after_warm_up(schedule):
    config = OptimizerConfig(schedule=schedule, warmup_steps=5)
    factors = [learning_rate_factor(step, 50, config) for step in range(5, 60)]
    assert factors == sorted(factors, reverse=True)
    assert factors[0] == 1
    assert factors[-1] == pytest.approx(config.min_learning_rate_ratio)


@pytest.mark.parametrize(("warmup", "expected"), [(0, [1, 1, 1]), (1, [1, 1, 1]), (2, [0.5, 1, 1])])
def test_write_penalty_factor_grows_to_1(warmup, expected):
    config = OptimizerConfig(write_penalty_warmup_steps=warmup)
    assert [write_penalty_factor(step, config) for step in range(3)] == expected
