"""Ranks that share windows, in the plan: found where they are needed, and counted."""

import itertools
import json
from typing import get_args

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from infini_ds import cli
from infini_ds.config import MemoryConfig, RunConfig, load
from infini_ds.errors import UserError
from infini_ds.kernels.infini_attention import Inputs
from infini_ds.kernels.infini_attention.parallel import memory_before_part
from infini_ds.memory import RULES
from infini_ds.model.block import Checkpointing
from infini_ds.model.flops import forward_flops_per_token, sharing_flops
from infini_ds.model.transformer import full_layout
from infini_ds.parallel.part import Part
from infini_ds.planning.plan import Plan, alternatives, least_memory, plan, with_context
from infini_ds.planning.report import GIB
from tests import tiny
from tests.config.test_config import CONFIGS
from tests.planning.test_activations import Echo

TREE = {
    "model__vocab_size": 61, "model__num_layers": 2, "model__segment_length": 64,
    "model__hidden_size": 64, "model__head_dim": 64, "model__memory_rule": "delta",
    "train__batch_size": 4, "train__window_segments": 16, "train__dtype": "bf16",
}  # fmt: skip


def config(**changes) -> RunConfig:
    return tiny.run_config(**TREE | changes)


def shipped(name: str) -> RunConfig:
    return load(next(path for path in CONFIGS if path.stem == name), ["model.vocab_size=64000"])


def every_plan(config: RunConfig, processes: int) -> list[Plan]:
    """All layouts, each one played."""
    plans = []
    powers = [2**power for power in range(5)]
    for stages, chunks, kind, context in itertools.product(
        powers, powers, get_args(Checkpointing), powers
    ):
        if config.train.window_segments // chunks % context or (stages == 1 and chunks > 1):
            continue
        choice = {"chunks": chunks, "activation_checkpointing": kind}
        changed = config.model_copy(update={"train": config.train.model_copy(update=choice)})
        try:
            plans.append(plan(with_context(changed, context, stages), processes))
        except UserError:
            continue
    return plans


def weighed(plan: Plan) -> float:
    return plan.most * 1.25 ** (plan.context.bit_length() - 1)


def test_search_finds_what_playing_every_layout_finds():
    for rule, processes, part in (("linear", 4, 1.0), ("delta", 8, 1.0), ("delta", 8, 0.5)):
        run = config(model__memory_rule=rule)
        plans = every_plan(run, processes)
        least, most = (choose(each.most for each in plans) for choose in (min, max))
        assert least_memory(run, processes) == least
        limit = least + part * (most - least)
        plans = [each for each in plans if each.most <= limit]
        found = alternatives(run, processes, limit)
        assert found
        for each in plans:
            assert any(
                other.efficiency >= each.efficiency and weighed(other) <= weighed(each)
                for other in found
            ) or any(
                other.efficiency >= each.efficiency and other.most <= each.most for other in found
            )
        for one, other in itertools.pairwise(found):
            assert one.efficiency >= other.efficiency
            assert one.most > other.most
            assert weighed(one) > weighed(other)


def test_few_lanes_use_all_devices_only_by_sharing():
    run = config(model__num_layers=1, train__batch_size=2)
    with pytest.raises(UserError):
        plan(run, 8)
    found = alternatives(run, 8)
    assert found
    assert {len(each.stages) for each in found} == {1}
    assert min(each.context for each in found) == 4
    assert all(each.data == 8 for each in found)


def test_windows_too_long_for_a_device_are_shared():
    run = config(model__segment_length=1024)
    plans = every_plan(run, 8)
    limit = 0.9 * min(each.most for each in plans if each.context == 1)
    found = alternatives(run, 8, limit)
    assert found
    assert all(each.context > 1 and each.most <= limit for each in found)


def test_each_doubling_of_ranks_is_worth_it():
    found = alternatives(shipped("llama3_8b_continual"), 64)
    assert {each.context for each in found} > {1}
    for one, other in itertools.pairwise(found):
        doublings = max(0, other.context.bit_length() - one.context.bit_length())
        assert other.most < 0.8**doublings * one.most


@pytest.mark.parametrize("rule", RULES)
def test_bytes_are_those_of_the_part(rule):
    run = config(model__memory_rule=rule, train__chunks=2, parallel__pipeline_stages=2)
    for context in (1, 2, 4):
        made = plan(with_context(run, context), 8)
        for index, stage in enumerate(made.stages):
            bounds = tuple(each.first_block for each in made.stages) + (run.model.num_layers,)
            part = Part(index, 0, made.micro_batches, 1, bounds, context)
            assert stage.exchanged == part.step_exchange_bytes(run.model, 2)
            assert (stage.exchanged > 0) == (context > 1)
        if context == 1:
            without = [stage.sent for stage in made.stages]
    own, groups = without[0] / 4, 8 // 2 // context  # of one lane on each of four ranks
    assert made.micro_batches == 4 // groups
    assert own > 0


@pytest.mark.parametrize(
    ("name", "processes", "most", "efficiency", "sent"),
    [
        ("llama3_8b_continual", 64, 62_730_160_414, 0.9016849048313507, 2_148_533_248),
        ("infini_70b", 256, 38_508_443_793, 0.6578659962563117, 8_592_035_840),
    ],
)
def test_plans_without_sharing_are_as_they_were(name, processes, most, efficiency, sent):
    """As printed before the plan knew of sharing, when these configs had the paper's rule."""
    run = shipped(name)
    changes: dict = {"memory_rule": "delta", "memory": MemoryConfig()}
    if name == "llama3_8b_continual":
        changes["vocab_size"] = 128256
    run = run.model_copy(update={"model": run.model.model_copy(update=changes)})
    made = plan(run, processes)
    assert (made.most, made.stages[0].sent) == (most, sent)
    assert made.efficiency == pytest.approx(efficiency, rel=1e-12)
    assert (made.context, made.exchange) == (1, 0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("segments", "ranks"), [(1, 2), (4, 2), (2, 8)])
def test_operations_are_those_of_the_products(rule, segments, ranks):
    d, kv_heads, n = 64, 2, 128
    model = tiny.model_config(
        num_heads=4, num_kv_heads=kv_heads, head_dim=d, segment_length=n, memory_rule=rule
    )
    k, v = torch.randn(2, 1, segments, n, kv_heads, d)
    memory = RULES[rule].empty(1, kv_heads, d)
    layout = full_layout(1, segments, n, k.device)
    unused = torch.empty(0)
    inputs = Inputs(unused, k, v, None, memory, layout, unused, rule, (unused, unused))
    with FlopCounterMode(display=False) as counter:
        memory_before_part(inputs, Echo(ranks))
    tokens = kv_heads * segments * n
    counted = counter.get_total_flops()
    assert sharing_flops(model, segments, ranks, twice=True) == pytest.approx(counted, rel=0.05)
    once = sharing_flops(model, segments, ranks, twice=False)
    writes = (
        tokens
        * {
            "linear": 2 * d * (d + 1),
            "delta": 4 * d * (d + 1),
            "gated_delta": 2 * d * (2 * 32 + 2 * d),
            "gated_delta_dpfp": 2 * (64 * 7 * d + 12 * d**2),
        }[rule]
    )
    assert sharing_flops(model, segments, ranks, twice=True) == once + writes


@pytest.mark.parametrize("checkpointing", ["none", "attention", "block"])
def test_operations_are_in_the_time(checkpointing):
    run = config(
        model__num_layers=2, train__batch_size=1, train__activation_checkpointing=checkpointing,
        train__loss_chunk_tokens=1024, parallel={"pipeline_stages": 1, "context_parallel": 4},
    )  # fmt: skip
    made = plan(run, 4)
    tokens = 4 * 64
    model = 3 * tokens * sum(forward_flops_per_token(run.model))
    sharing = 2 * sharing_flops(run.model, 4, 4, twice=True)
    assert made.exchange / made.efficiency == pytest.approx(3 * sharing / model)
    whole = made.efficiency + made.waiting + made.again + made.exchange
    assert whole == pytest.approx(1)
    again = made.again / made.exchange
    if checkpointing == "none":
        assert again == 0
    else:  # what is computed again includes the operations once more
        alone = plan(with_context(run, 1), 1)
        per_model = alone.again / alone.efficiency
        expected = per_model * model / (3 * sharing) + 1 / 3
        assert again == pytest.approx(expected)


def test_command_says_what_sharing_brings_and_costs(tmp_path, capsys):
    tree = TREE | {
        "train__batch_size": 1, "model__num_layers": 1,
        "parallel": {"pipeline_stages": 1, "context_parallel": 4},
    }  # fmt: skip
    path, figures = tiny.write_run(tmp_path / "run.yaml", **tree), tmp_path / "plan.json"
    assert cli.main(["plan", str(path), "--processes", "4", "--json", str(figures)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "4 data-parallel (4 ranks to a window)" in shown
    assert "4 ranks share each window: a device keeps " in shown
    assert "; otherwise 1 lanes in 1 stages use 1 of 4 devices" in shown
    assert "% serves to share windows" in shown
    written = json.loads(figures.read_text())
    own = written["plan"]
    assert own["context"] == 4
    assert own["exchange"] > 0
    assert own["stages"][0]["exchanged"] == own["stages"][0]["sent"] > 0
    assert {each["context"] for each in written["alternatives"]} == {4}


def test_too_few_lanes_name_how_many_ranks_would_share(tmp_path, capsys):
    path = tiny.write_run(tmp_path / "run.yaml", **TREE | {"parallel": {"pipeline_stages": 1}})
    assert cli.main(["plan", str(path), "--processes", "16"]) == 2
    assert "and parallel.context_parallel=4 would use all 16\n" in capsys.readouterr().err
    assert cli.main(["plan", str(path), "--processes", "12"]) == 2  # 3 does not divide 16 segments
    assert "would use all" not in capsys.readouterr().err


def test_too_little_memory_names_the_ranks_that_would_do(tmp_path, capsys):
    tree = TREE | {"parallel": {"pipeline_stages": 1}}
    run = tiny.run_config(**tree)
    alone, shared = (plan(with_context(run, context), 4).most for context in (1, 2))
    path = tiny.write_run(tmp_path / "run.yaml", **tree)
    memory = f"--memory={(alone + shared) / 2 / GIB}"
    assert cli.main(["plan", str(path), "--processes", "4", memory]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert " MiB with parallel.context_parallel=2; the table shows layouts" in line
