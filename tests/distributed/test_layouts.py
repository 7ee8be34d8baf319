"""One function, any layout: the engine beside a plain PyTorch loop on one process."""

import functools
import itertools
import json
import random
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from infini_ds import InfiniTransformer
from infini_ds.memory import RULES
from infini_ds.model.head import token_losses
from infini_ds.model.layer_state import empty_state
from infini_ds.model.muon import make_optimizer
from infini_ds.model.optimizer import learning_rate_factor, parameter_groups, set_learning_rate
from infini_ds.model.trained import is_trained
from tests.distributed import layout_worker
from tests.distributed.layout_worker import (
    LANES,
    PROMPT,
    SEGMENTS,
    STEPS,
    config_of,
    spread_write_gates,
    windows_of,
)
from tests.distributed.processes import run_ranks

TOLERANCE = 1e-5

# (pipeline, data, accumulation)
DEEP = [(3, 1, 4), (4, 1, 4)]
LAYOUTS = [(1, 1, 4), (2, 1, 4), (1, 2, 2), (2, 2, 2), *DEEP]

FACTORS = {
    "parallel.memory_transport": ("carried", "resident"),
    "train.activation_checkpointing": ("none", "attention", "block"),
    "model.memory_rule": tuple(RULES),
    "model.tie_embeddings": (False, True),
    "model.num_kv_heads": (4, 2),
    "train.chunks": (1, 2, 4),
    "parallel.zero_stage": (0, 1),
    "optimizer.gradient_clipping": (0.5, 0.0),
}

# Each value of each factor at least once; every layout runs all of them.
CHOICES = [
    ("carried", "none", "linear", False, 2, 1, 0, 0.5),
    ("resident", "attention", "delta", True, 4, 2, 1, 0.5),
    ("carried", "block", "delta", True, 2, 4, 0, 0.5),
    ("resident", "none", "linear", False, 2, 4, 1, 0.0),
    ("carried", "attention", "delta", True, 2, 1, 0, 0.0),
    ("resident", "block", "gated_delta", False, 2, 2, 1, 0.5),
    ("carried", "attention", "gated_delta_dpfp", True, 4, 2, 0, 0.5),
]


def case_of(layout, choice) -> dict:
    pipeline, data, accumulation = layout
    micro = LANES // (data * accumulation)
    own = {"parallel.pipeline_stages": pipeline, "train.micro_batch_size": micro}
    return {**dict(zip(FACTORS, choice, strict=True)), **own}


def name_of(layout, choice) -> str:
    pipeline, data, accumulation = layout
    transport, checkpointing, rule, tied, kv_heads, chunks, zero, clipping = choice
    words = [
        f"pipeline{pipeline}", f"data{data}", f"accumulation{accumulation}", transport,
        f"checkpoint_{checkpointing}", rule, "tied" if tied else "untied", f"kv{kv_heads}",
        f"chunks{chunks}", f"zero{zero}", "clipped" if clipping else "unclipped",
    ]  # fmt: skip
    return "-".join(words)


def cases(layouts, choices) -> dict[str, tuple[int, dict]]:
    """World size and settings by name."""
    return {
        name_of(layout, choice): (layout[0] * layout[1], case_of(layout, choice))
        for layout, choice in itertools.product(layouts, choices)
    }


def sampled(layouts, count: int) -> dict[str, tuple[int, dict]]:
    draw = random.Random(0)
    everything = list(itertools.product(*FACTORS.values()))
    found = {}
    for layout in layouts:
        found |= cases([layout], draw.sample(everything, count))
    return found


BF16 = {"train.dtype": "bf16", "train.chunks": 2, "model.memory_rule": "delta"}
BF16_CASES = {
    f"bf16-pipeline{pipeline}-data{data}-{transport}-zero{zero}{suffix}": (
        pipeline * data,
        {
            **BF16,
            "parallel.pipeline_stages": pipeline,
            "parallel.memory_transport": transport,
            "parallel.zero_stage": zero,
            "model.tie_embeddings": suffix == "-tied",
            "model.memory_rule": "gated_delta" if suffix == "-gated_delta" else "delta",
        },
    )
    for pipeline, data, transport, zero, suffix in [
        (1, 1, "resident", 1, ""),
        (2, 1, "carried", 1, ""),
        (2, 1, "carried", 1, "-again"),
        (2, 1, "resident", 0, ""),
        (1, 2, "carried", 1, ""),
        (1, 2, "carried", 0, ""),
        (1, 1, "resident", 1, "-tied"),
        (2, 1, "carried", 1, "-tied"),
        (2, 1, "carried", 0, "-tied"),
        (1, 1, "resident", 1, "-gated_delta"),
        (2, 1, "carried", 1, "-gated_delta"),
    ]
}
BF16_CASES |= {
    f"bf16-pipeline{pipeline}-data{data}-{transport}-zero{zero}-muon": (
        pipeline * data,
        {
            **BF16,
            "optimizer.name": "muon",
            "parallel.pipeline_stages": pipeline,
            "parallel.memory_transport": transport,
            "parallel.zero_stage": zero,
        },
    )
    for pipeline, data, transport, zero in [
        (1, 1, "resident", 1), (1, 2, "carried", 1), (2, 1, "carried", 0), (2, 2, "carried", 1),
    ]
}  # fmt: skip
BF16_CASES |= {
    f"bf16-context2-zero{zero}": (
        2,
        {
            **BF16, "parallel.pipeline_stages": 1, "parallel.context_parallel": 2,
            "parallel.zero_stage": zero,
        },
    )
    for zero in (0, 1)
}  # fmt: skip
# Several lanes a micro-batch, one with an odd number of lanes in memory messages.
LARGER_MICRO_BATCHES = {
    "pipeline2-two_lanes_a_micro_batch": (
        2, {"parallel.pipeline_stages": 2, "train.micro_batch_size": 2, "train.chunks": 2},
    ),
    "pipeline2-four_lanes_a_micro_batch": (
        2, {"parallel.pipeline_stages": 2, "train.micro_batch_size": 4, "train.chunks": 2},
    ),
    "data2-two_lanes_a_micro_batch": (
        2, {"parallel.pipeline_stages": 1, "train.micro_batch_size": 2},
    ),
}  # fmt: skip
# What the model learns about writing, with hard zeros and ones among the write weights.
WRITING = {
    "model.memory": {
        "write_gate": True,
        "write_gate_sees_keys": True,
        "write_penalty": 0.3,
        "short_conv": True,
    },
    "optimizer.write_penalty_warmup_steps": 3,
    "train.chunks": 2,
}
WRITING_CASES = {
    f"writing-pipeline2-data{data}-{transport}-{rule}": (
        2 * data,
        {
            **WRITING,
            "parallel.pipeline_stages": 2,
            "parallel.memory_transport": transport,
            "model.memory_rule": rule,
            "train.activation_checkpointing": checkpointing,
        },
    )
    for data, transport, rule, checkpointing in [
        (1, "carried", "linear", "none"),
        (1, "resident", "delta", "block"),
        (2, "resident", "linear", "attention"),
        (2, "carried", "delta", "none"),
        (1, "carried", "gated_delta", "block"),
    ]
}
# Some parameters keep their values; block 4 is the last, and 0 is the embedding.
TRAINED = {"optimizer.gradient_clipping": 0.01, "train.chunks": 2}
TRAINED_CASES = {
    "trained-pipeline2-nothing_on_the_first_stage": (
        2,
        {
            "parallel.pipeline_stages": 2, "parallel.zero_stage": 0,
            "optimizer.train": ["layers.4.*"],
        },
    ),
    "trained-pipeline2-nothing_on_the_first_stage-tied-zero1": (
        2,
        {
            "parallel.pipeline_stages": 2, "parallel.zero_stage": 1, "model.tie_embeddings": True,
            "optimizer.train": ["layers.4.*"], "train.activation_checkpointing": "block",
        },
    ),
    "trained-pipeline2-nothing_on_the_last_stage": (
        2,
        {
            "parallel.pipeline_stages": 2, "parallel.memory_transport": "resident",
            "optimizer.train": ["layers.1.*"], "train.activation_checkpointing": "attention",
        },
    ),
    "trained-pipeline2-gates-packed": (
        2,
        {
            "parallel.pipeline_stages": 2, "model.memory_rule": "delta", "data.packing": True,
            "optimizer.train": ["*.beta"],
        },
    ),
    "trained-pipeline2-write_gates": (
        2,
        {
            **WRITING, "parallel.pipeline_stages": 2, "model.memory_rule": "gated_delta",
            "optimizer.train": ["*.write_gate.*", "*.beta", "*norm.weight"],
        },
    ),
    "trained-pipeline2-muon": (
        2,
        {
            "parallel.pipeline_stages": 2, "parallel.zero_stage": 1, "optimizer.name": "muon",
            "optimizer.train": ["layers.4.*", "*.beta"],
        },
    ),
    "trained-data2-tied_embedding": (
        2,
        {
            "parallel.pipeline_stages": 1, "parallel.zero_stage": 1, "model.tie_embeddings": True,
            "optimizer.train": ["layers.0.*"],
        },
    ),
    "trained-context2-attention": (
        2,
        {
            "parallel.pipeline_stages": 1, "parallel.context_parallel": 2,
            "train.micro_batch_size": 2, "optimizer.train": ["*.2.self_attn.*", "*.beta"],
        },
    ),
} | {
    f"trained-data2-zero{zero}-{what}": (
        2, {"parallel.pipeline_stages": 1, "parallel.zero_stage": zero, **settings},
    )
    for zero in (2, 3)
    for what, settings in (
        ("gates", {"optimizer.train": ["*.beta"], "model.memory_rule": "gated_delta"}),
        (
            "tied_embedding",
            {
                "optimizer.train": ["layers.0.*"], "model.tie_embeddings": True,
                "train.activation_checkpointing": "block",
            },
        ),
        (
            "attention",
            {"optimizer.train": ["*.2.self_attn.*", "*.beta"], "train.micro_batch_size": 1},
        ),
    )
}  # fmt: skip
TRAINED_CASES = {name: (world, TRAINED | case) for name, (world, case) in TRAINED_CASES.items()}
BF16_CASES |= {
    f"bf16-pipeline{pipeline}-data1-resident-zero{zero}-trained": (
        pipeline,
        {
            **BF16, "parallel.pipeline_stages": pipeline, "parallel.zero_stage": zero,
            "parallel.memory_transport": "resident", "optimizer.train": ["layers.4.*"],
        },
    )
    for pipeline, zero in ((1, 1), (2, 0), (2, 1))
}  # fmt: skip
NORMALISED = {
    "pipeline2-qk_norm": (
        2,
        {
            "model.qk_norm": True, "parallel.pipeline_stages": 2, "train.chunks": 2,
            "model.memory_rule": "delta", "train.activation_checkpointing": "block",
        },
    ),
}  # fmt: skip
SLIDING = {
    f"sliding-{name}": (
        2, {**WRITING, "model.use_sliding_window": True, "model.num_kv_heads": 2, **settings}
    )
    for name, settings in {
        "pipeline2-chunks2": {"parallel.pipeline_stages": 2, "train.chunks": 2},
        "pipeline2-resident-packed": {
            "parallel.pipeline_stages": 2, "parallel.memory_transport": "resident",
            "data.packing": True, "train.activation_checkpointing": "block",
        },
        "context2": {"parallel.context_parallel": 2, "train.micro_batch_size": 2},
        "context2-chunks2-packed": {
            "parallel.context_parallel": 2, "train.micro_batch_size": 2, "train.chunks": 2,
            "data.packing": True, "model.memory_rule": "gated_delta",
            "train.activation_checkpointing": "attention",
        },
    }.items()
}  # fmt: skip
# The second of four layers has a memory, so that the second of two stages has none, or two have.
SOME_LAYERS = {
    f"layers-{name}": (
        2,
        {
            **WRITING, "model.use_sliding_window": True,
            "model.memory": WRITING["model.memory"] | {"layers": layers}, **settings,
        },
    )
    for name, layers, settings in [
        ("pipeline2-carried", [1], {"parallel.pipeline_stages": 2, "train.chunks": 2}),
        (
            "pipeline2-resident-packed", [1],
            {
                "parallel.pipeline_stages": 2, "parallel.memory_transport": "resident",
                "model.memory_rule": "gated_delta", "data.packing": True,
                "train.activation_checkpointing": "block",
            },
        ),
        (
            "context2", [0, 3],
            {
                "parallel.context_parallel": 2, "train.micro_batch_size": 2,
                "model.memory_rule": "delta", "train.activation_checkpointing": "attention",
            },
        ),
        ("data2-none", [], {"parallel.zero_stage": 1}),
    ]
}  # fmt: skip
PACKED = {
    f"packed-pipeline{pipeline}-data{data}-{transport}-{rule}": (
        pipeline * data,
        {
            **WRITING,
            "data.packing": True,
            "parallel.pipeline_stages": pipeline,
            "parallel.memory_transport": transport,
            "model.memory_rule": rule,
            "model.num_kv_heads": 2,
        },
    )
    for pipeline, data, transport, rule in [
        (2, 1, "carried", "delta"), (1, 2, "resident", "linear"), (2, 2, "resident", "delta"),
        (2, 1, "carried", "gated_delta"),
    ]
}  # fmt: skip
# ZeRO cuts matrices, which Muon takes whole.
MUON_CASES = {
    f"muon-pipeline{pipeline}-data{data}-zero{zero}{'-tied' if tied else ''}": (
        pipeline * data,
        {
            "optimizer.name": "muon",
            "parallel.pipeline_stages": pipeline,
            "parallel.zero_stage": zero,
            "model.tie_embeddings": tied,
            "model.num_kv_heads": 2,
            "optimizer.gradient_clipping": 0.5 if tied else 0.0,
        },
    )
    for pipeline, data, zero, tied in [
        (1, 1, 1, False), (1, 2, 1, False), (1, 2, 0, True), (2, 1, 0, False), (2, 1, 1, False),
        (2, 2, 1, True), (1, 4, 1, False),
    ]
}  # fmt: skip
MUON_CASES["muon-context2"] = (
    2, {"optimizer.name": "muon", "parallel.context_parallel": 2, "train.micro_batch_size": 2}
)  # fmt: skip


class Context(NamedTuple):
    """A layout in which ranks share windows."""

    context: int
    pipeline: int = 1
    groups: int = 1
    chunks: int = 1
    transport: str = "carried"
    rule: str = "linear"
    checkpointing: str = "none"
    packed: bool = False
    segments: int = SEGMENTS

    @property
    def name(self) -> str:
        return (
            f"context{self.context}-pipeline{self.pipeline}-groups{self.groups}-"
            f"chunks{self.chunks}-{self.transport}-{self.rule}-checkpoint_{self.checkpointing}"
            f"{'-packed' if self.packed else ''}"
        )

    @property
    def case(self) -> tuple[int, dict]:
        """With write gates, convolutions and grouped heads where it is packed."""
        settings = {
            "parallel.context_parallel": self.context,
            "parallel.pipeline_stages": self.pipeline,
            "parallel.memory_transport": self.transport,
            "model.memory_rule": self.rule,
            "train.activation_checkpointing": self.checkpointing,
            "train.micro_batch_size": 2,
        }
        if self.packed:
            settings |= {**WRITING, "data.packing": True, "model.num_kv_heads": 2}
        settings |= {"train.chunks": self.chunks, "train.window_segments": self.segments}
        return self.context * self.pipeline * self.groups, settings


CONTEXT_CASES = {
    each.name: each.case
    for each in (
        Context(2),
        Context(2, 1, 1, 2, "resident", "delta", "block", True),
        Context(2, rule="delta", checkpointing="attention"),
        Context(2, 2, 1, 2, "carried", "delta", "block", True),
        Context(2, 2, 1, 1, "resident", "linear", "none", True),
        Context(2, 1, 2, 2, "carried", "linear", "attention", False),
        Context(4, rule="delta", packed=True),
        Context(2, 1, 2, 2, "resident", "gated_delta", "attention", True),
        Context(2, 2, 1, 2, "carried", "gated_delta", "block", False),
        Context(2, 1, 1, 2, "resident", "gated_delta_dpfp", "attention", True),
    )
}
CHOICES_OF_CONTEXT = list(
    itertools.product(
        FACTORS["parallel.memory_transport"],
        FACTORS["model.memory_rule"],
        FACTORS["train.activation_checkpointing"],
        (False, True),
    )
)
LARGER = [(2, 2, 2), (4, 1, 1), (4, 2, 1), (4, 1, 2)]
SLOW_CONTEXT_CASES = {
    each.name: each.case
    for each in (
        *(
            Context(2, *layout, *choice)
            for layout in itertools.product((1, 2), (1, 2), (1, 2))
            if layout[:2] != (2, 2)  # eight processes
            for choice in CHOICES_OF_CONTEXT
        ),
        *(
            Context(4, 1, 1, chunks, transport, rule, checkpointing, rule != "linear", segments=8)
            for chunks in (1, 2)
            for transport in FACTORS["parallel.memory_transport"]
            for rule in FACTORS["model.memory_rule"]
            for checkpointing in ("none", "block")
        ),
        *(
            Context(*layout, *choice, segments=8)
            for layout in LARGER
            for choice in (
                (1, "carried", "linear", "none", False),
                (1, "resident", "linear", "attention", False),
                (1, "resident", "delta", "block", True),
                (2, "carried", "linear", "block", False),
                (2, "carried", "delta", "block", True),
                (2, "resident", "delta", "none", True),
                (1, "resident", "gated_delta", "none", False),
                (2, "carried", "gated_delta", "block", True),
            )
        ),
        Context(4, packed=True),
        Context(4, pipeline=2, transport="resident", packed=True),
        Context(4, 2, 2, 1, "carried", "delta", "none", True, segments=8),
        Context(4, 2, 2, 2, "carried", "delta", "block", True, segments=8),
        Context(4, 2, 2, 2, "resident", "linear", "block", False, segments=8),
        Context(4, 2, 2, 1, "resident", "linear", "none", False, segments=8),
        Context(4, 2, 2, 2, "carried", "gated_delta", "attention", True, segments=8),
    )
}


class Sharded(NamedTuple):
    """A layout without a pipeline, whose gradients, or gradients and weights, are sharded."""

    zero: int
    data: int
    accumulation: int = 1
    rule: str = "linear"
    chunks: int = 1
    tied: bool = False
    checkpointing: str = "none"
    clipping: float = 0.5
    more: str = ""

    @property
    def name(self) -> str:
        return (
            f"zero{self.zero}-data{self.data}-accumulation{self.accumulation}-{self.rule}-"
            f"chunks{self.chunks}-{'tied' if self.tied else 'untied'}-"
            f"checkpoint_{self.checkpointing}-{'clipped' if self.clipping else 'unclipped'}"
            f"{self.more and '-' + self.more}"
        )

    @property
    def case(self) -> tuple[int, dict]:
        settings = {
            "parallel.pipeline_stages": "auto", "parallel.zero_stage": self.zero,
            "train.micro_batch_size": LANES // (self.data * self.accumulation),
            "model.memory_rule": self.rule, "train.chunks": self.chunks,
            "model.tie_embeddings": self.tied,
            "train.activation_checkpointing": self.checkpointing,
            "optimizer.gradient_clipping": self.clipping,
        }  # fmt: skip
        own = {
            "writing": {**WRITING, "model.num_kv_heads": 2},
            "packed": {**WRITING, "data.packing": True},
            "sliding": {**WRITING, "model.use_sliding_window": True},
            "layers": {"model.memory": WRITING["model.memory"] | {"layers": [2]}},
            "context2": {"parallel.context_parallel": 2, "train.micro_batch_size": 2},
        }
        return self.data, settings | own.get(self.more, {})


SHARDED_CASES = {
    each.name: each.case
    for zero in (2, 3)
    for each in (
        Sharded(zero, 1, 4, "gated_delta", 2, True, "block"),
        Sharded(zero, 1, 1, "linear", 1, False, "attention", 0.0),
        Sharded(zero, 2, 2, "gated_delta", 4, False, "attention", more="writing"),
        Sharded(zero, 2, 1, "delta", 1, True, more="packed"),
        Sharded(zero, 2, 2, "linear", 2, True, "block", 0.0, more="writing"),
        Sharded(zero, 2, 1, "gated_delta", 2, False, "block", more="context2"),
        Sharded(zero, 2, 2, "delta", 1, False, more="sliding"),
        Sharded(zero, 2, 1, "gated_delta_dpfp", 2, False, "attention", more="layers"),
        Sharded(zero, 4, 1, "gated_delta", 2, True, "block"),
    )
}
SLOW_SHARDED_CASES = {
    each.name: each.case
    for zero, (data, accumulations), rule, chunks, tied in itertools.product(
        (2, 3), ((1, (1, 4)), (2, (1, 2)), (4, (1,))), RULES, (1, 2, 4), (False, True)
    )
    for accumulation in accumulations
    for each in (
        Sharded(
            zero, data, accumulation, rule, chunks, tied,
            FACTORS["train.activation_checkpointing"][chunks % 3],
        ),
    )
}  # fmt: skip
FP32_CASES = (
    cases(LAYOUTS, CHOICES) | LARGER_MICRO_BATCHES | WRITING_CASES | NORMALISED | PACKED
    | SLIDING | SOME_LAYERS | CONTEXT_CASES | TRAINED_CASES | MUON_CASES | SHARDED_CASES
)  # fmt: skip
DEFAULT_CASES = FP32_CASES | BF16_CASES
DEEP_CASES = cases(DEEP, CHOICES)
"""Pipelines of more processes than most machines have cores for, in the long suite."""
SLOW_CASES = sampled(LAYOUTS, 12)


def marked(names: dict) -> list:
    """Parameters for all cases of a set, of which the long suite has the deep ones."""
    deep = pytest.mark.long
    return [pytest.param(name, marks=deep) if name in DEEP_CASES else name for name in names]


RANKS = 96
"""Ranks of all cases of a launch at most, so that no test waits for too many of them."""


class Results:
    """What each case gave, by rank; cases of a set and world size are launched together."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._launched: dict[str, Path | Exception] = {}

    def of(self, name: str, known: dict[str, tuple[int, dict]]) -> list[dict]:
        world, _ = known[name]
        equal = [
            other
            for other, (size, _) in known.items()
            if size == world and (other in DEEP_CASES) == (name in DEEP_CASES)
        ]
        first = equal.index(name) // (RANKS // world) * (RANKS // world)
        together = equal[first : first + RANKS // world]
        cases = json.dumps({other: known[other][1] for other in together})
        if cases not in self._launched:
            limit = 120 + 20 * world * len(together)
            limit += 300 if known is OFFLOADED else 0  # to be compiled
            self._launched[cases] = self._launch(world, cases, limit)
        folder = self._launched[cases]
        if isinstance(folder, Exception):
            raise folder
        return [torch.load(folder / f"{name}.{rank}.pt") for rank in range(world)]

    def _launch(self, world: int, cases: str, limit: float) -> Path | Exception:
        folder = self._folder / f"launch{len(self._launched)}_world{world}"
        folder.mkdir()
        (folder / "cases.json").write_text(cases)
        script = [layout_worker.__file__, folder / "cases.json", folder]
        try:
            run_ranks(script, world, folder, limit)
        except Exception as failure:  # told by every test that needs it, but made once
            return failure
        return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Results:
    return Results(tmp_path_factory.mktemp("layouts"))


@functools.cache
def reference(settings: str) -> dict:
    """The same steps with the model, optimizer and clipping of plain PyTorch, all lanes at once."""
    config = config_of(json.loads(settings))
    with pytest.MonkeyPatch.context() as patch:
        spread_write_gates(patch)
        model = InfiniTransformer(config.model, seed=config.seed)
    named = list(model.named_parameters())
    for name, parameter in named:
        parameter.requires_grad_(is_trained(name, config.optimizer.train))
    groups = parameter_groups(named, config.optimizer)
    optimizer = make_optimizer(groups, config, named)
    initial = {name: parameter.detach().clone() for name, parameter in named}
    layers = map(config.model.of_layer, range(config.model.num_layers))
    memory = [empty_state(layer, LANES) for layer in layers]
    losses, norms, writes = [], [], []
    for step in range(STEPS):
        windows, count = windows_of(step, config)
        hidden, memory, stats = model.read_window(windows.tokens, windows.layout, memory)
        memory = [layer.map(torch.Tensor.detach) for layer in memory]
        loss = token_losses(hidden, *model.head(), windows.labels, 10**6).sum() / count
        means = [layer.mass / (count * config.model.kv_heads) for layer in stats]
        optimizer.zero_grad()
        warmup = max(1, config.optimizer.write_penalty_warmup_steps)
        penalty = config.model.memory.write_penalty * min(1.0, (step + 1) / warmup)
        (loss + penalty * sum(means)).backward()
        limit = config.optimizer.gradient_clipping or float("inf")
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit)))
        factor = learning_rate_factor(step, config.train.steps, config.optimizer)
        set_learning_rate(optimizer, factor)
        optimizer.step()
        losses.append(float(loss.detach()))
        writes.append([[float(value.detach()) for value in layer] for layer in stats])
    weights = {name: parameter.detach() for name, parameter in named}
    text = model.generate(torch.tensor([PROMPT]), 20, temperature=0)[0].tolist()
    return {
        "losses": losses, "norms": norms, "weights": weights, "initial": initial, "memory": memory,
        "writes": writes, "text": text,
    }  # fmt: skip


def expected_of(case: dict) -> dict:
    """What the reference gives with those of a case's settings that are not of the layout."""
    kept = ("model.", "optimizer.", "data.", "train.window_segments")
    return reference(json.dumps({name: case[name] for name in case if name.startswith(kept)}))


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, of whole tensors."""
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm())


def assert_as_reference(ranks: list[dict], expected: dict, tolerance: float) -> None:
    for rank in ranks:
        assert rank["losses"] == pytest.approx(expected["losses"], rel=tolerance)
        assert rank["norms"] == pytest.approx(expected["norms"], rel=tolerance)
        for name, weight in rank["weights"].items():
            assert distance(weight, expected["weights"][name]) < tolerance, name
        for block, memory in rank["memories"].items():
            mine = slice(rank["first_lane"], rank["first_lane"] + len(memory["norm"]))
            for part, tensor in expected["memory"][block].named().items():
                assert memory[part].shape == tensor[mine].shape
                if tensor.numel():  # some rules have no norm
                    far = distance(memory[part], tensor[mine])
                    assert far < tolerance, f"{part} of block {block}"
    held = {block for rank in ranks for block in rank["memories"]}
    assert held == set(range(len(expected["memory"])))


@pytest.mark.parametrize("name", marked(FP32_CASES))
def test_training_agrees_with_plain_pytorch(results, name):
    expected = expected_of(FP32_CASES[name][1])
    clipping = FP32_CASES[name][1].get("optimizer.gradient_clipping", 0.5)
    assert expected["norms"][0] > clipping, "clipping must be active"
    assert_as_reference(results.of(name, DEFAULT_CASES), expected, TOLERANCE)


@pytest.mark.parametrize("name", WRITING_CASES)
def test_write_statistics_are_those_of_one_process(results, name):
    expected = torch.tensor(expected_of(WRITING_CASES[name][1])["writes"], dtype=torch.float64)
    assert expected[..., 1].sum() > 0, "some weights must be exactly 0"
    for rank in results.of(name, DEFAULT_CASES):
        torch.testing.assert_close(torch.stack(rank["writes"]), expected, rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("name", WRITING_CASES)
def test_generated_text_is_that_of_one_process(results, name):
    expected = expected_of(WRITING_CASES[name][1])["text"]
    for rank in results.of(name, DEFAULT_CASES):
        assert rank["text"] == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_CASES)
def test_training_agrees_with_plain_pytorch_in_sampled_combinations(results, name):
    expected = expected_of(SLOW_CASES[name][1])
    assert_as_reference(results.of(name, SLOW_CASES), expected, TOLERANCE)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("name", SLOW_SHARDED_CASES)
def test_sharded_gradients_and_weights_agree_with_plain_pytorch(results, name):
    expected = expected_of(SLOW_SHARDED_CASES[name][1])
    assert_as_reference(results.of(name, SLOW_SHARDED_CASES), expected, TOLERANCE)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("name", SLOW_CONTEXT_CASES)
def test_ranks_that_share_windows_agree_with_plain_pytorch(results, name):
    ranks = results.of(name, SLOW_CONTEXT_CASES)
    assert_as_reference(ranks, expected_of(SLOW_CONTEXT_CASES[name][1]), TOLERANCE)
    for rank in ranks:
        assert rank["sent_bytes"] == STEPS * rank["step_bytes"]


@pytest.mark.parametrize(
    ("context", "segments"), [(2, SEGMENTS), (4, SEGMENTS), (4, 8)], ids=lambda v: str(v)
)
def test_documents_begin_before_at_and_after_the_edges_of_parts(context, segments):
    config = config_of(Context(context, segments=segments).case[1])
    starts = torch.cat([windows_of(step, config)[0].layout.starts for step in range(STEPS)])
    part = segments // context
    for edge in range(part, segments, part):
        for segment in (edge - 1, edge, min(edge + 1, segments - 1)):
            assert starts[:, segment].any()
        assert not starts[:, edge : edge + part].any(dim=1).all(), "some go on from part to part"


@pytest.mark.parametrize("name", CONTEXT_CASES)
def test_ranks_that_share_windows_have_equal_memories(results, name):
    """So that any of them can save for all, and a lane goes on alike on each."""
    ranks = results.of(name, DEFAULT_CASES)
    by_part: dict = {}
    for rank in ranks:
        for block, memory in rank["memories"].items():
            first = by_part.setdefault((block, rank["first_lane"]), memory)
            assert all(torch.equal(memory[part], first[part]) for part in memory)


@pytest.mark.parametrize("name", CONTEXT_CASES)
def test_bytes_that_ranks_of_a_window_exchange_are_counted_by_hand(results, name):
    """Forward and back: the same for each layer and chunk, however long the segments are."""
    world, case = CONTEXT_CASES[name]
    context, pipeline = case["parallel.context_parallel"], case["parallel.pipeline_stages"]
    heads, d = case.get("model.num_kv_heads", 4), 8
    rule = case["model.memory_rule"]
    features = 6 * d if rule == "gated_delta_dpfp" else d
    numbers = heads * features * (d + (0 if rule == "linear" else features))  # of M
    if RULES[rule].divides:
        numbers += heads * d + 1  # of z, and one flag
    if case.get("model.memory"):
        numbers += 4 * (4 + 2 * heads) * d + 1  # of what the convolution sees, and one flag
    layers = 4 // pipeline * case["train.chunks"]
    micro_batches = LANES // 2 * pipeline * context // world
    expected = 2 * (context - 1) * micro_batches * layers * 2 * numbers * 4
    for rank in results.of(name, DEFAULT_CASES):
        assert rank["exchanged_bytes"] == STEPS * expected


@pytest.mark.parametrize("name", marked(DEFAULT_CASES))
def test_initial_weights_are_those_of_one_process(results, name):
    case = DEFAULT_CASES[name][1]
    dtype = torch.bfloat16 if case.get("train.dtype") == "bf16" else torch.float32
    expected = expected_of(case)["initial"]
    seen = set()
    for rank in results.of(name, DEFAULT_CASES):
        for parameter, weight in rank["initial"].items():
            assert torch.equal(weight, expected[parameter].to(dtype)), parameter
            seen.add(parameter)
    assert seen == set(expected)


@pytest.mark.parametrize("name", marked(DEFAULT_CASES))
def test_module_state_is_weights_under_the_names_of_one_process(results, name):
    """No memory among it: a buffer would be saved once for all data-parallel ranks."""
    ranks = results.of(name, DEFAULT_CASES)
    expected = expected_of(DEFAULT_CASES[name][1])["weights"]
    assert {state for rank in ranks for state in rank["state_names"]} == set(expected)
    by_stage = {rank["stage"]: rank["state_names"] for rank in ranks}
    for first, second in itertools.combinations(by_stage.values(), 2):
        shared = set(first) & set(second)
        assert shared <= {"layers.0.weight"}, "only a tied weight is in two stages"


@pytest.mark.parametrize("name", marked(DEFAULT_CASES))
def test_bytes_sent_are_those_of_the_formula(results, name):
    for rank in results.of(name, DEFAULT_CASES):
        if name.startswith("trained-context"):  # what is not trained exchanges fewer gradients
            assert rank["sent_bytes"] < STEPS * rank["step_bytes"]
        else:
            assert rank["sent_bytes"] == STEPS * rank["step_bytes"]


@pytest.mark.parametrize("name", BF16_CASES)
def test_no_group_waits_longer_than_the_timeout(results, name):
    """But those of channels, which have a limit of their own that says more."""
    for rank in results.of(name, DEFAULT_CASES):
        assert rank["limits"] in ([60], [60, 120])


@pytest.mark.parametrize("name", BF16_CASES)
def test_bf16_gradients_are_summed_and_reduced_in_fp32(results, name):
    for rank in results.of(name, DEFAULT_CASES):
        if name.endswith("-trained") and rank["stage"] == 0:
            continue  # it trains nothing if it is the first of two
        assert len(rank["unrounded"]) == STEPS
        assert min(rank["unrounded"]) > 0.2  # share of the sums that are no numbers of bf16


@pytest.mark.parametrize("name", marked({n: c for n, c in DEFAULT_CASES.items() if "-tied" in n}))
def test_both_copies_of_a_tied_weight_are_equal(results, name):
    ranks = results.of(name, DEFAULT_CASES)
    copies = [
        rank["weights"]["layers.0.weight"] for rank in ranks if "layers.0.weight" in rank["weights"]
    ]
    assert copies
    assert all(torch.equal(copy, copies[0]) for copy in copies)


@pytest.mark.parametrize("name", BF16_CASES)
def test_bf16_is_close_to_plain_fp32(results, name):
    expected = expected_of(BF16_CASES[name][1])
    ranks = results.of(name, DEFAULT_CASES)
    assert {rank["optimizer"] for rank in ranks} == {"BF16_Optimizer"}
    for rank in ranks:
        assert rank["losses"] == pytest.approx(expected["losses"], rel=5e-3)
        assert rank["norms"] == pytest.approx(expected["norms"], rel=5e-2)


BF16_SUFFIXES = ("-tied", "-gated_delta", "-muon", "-trained")


@pytest.mark.parametrize("name", [name for name in BF16_CASES if "-again" not in name])
def test_bf16_agrees_with_one_process(results, name):
    suffix = next((own for own in BF16_SUFFIXES if name.endswith(own)), "")
    alone = f"bf16-pipeline1-data1-resident-zero1{suffix}"
    (expected,) = results.of(alone, DEFAULT_CASES)
    for rank in results.of(name, DEFAULT_CASES):
        assert rank["losses"] == pytest.approx(expected["losses"], rel=2e-3)
        assert rank["norms"] == pytest.approx(expected["norms"], rel=1e-2)
        for parameter, weight in rank["weights"].items():
            assert distance(weight, expected["weights"][parameter]) < 1e-2, parameter


def test_bf16_repeated_in_the_same_layout_is_identical(results):
    name = "bf16-pipeline2-data1-carried-zero1"
    one, other = (results.of(n, DEFAULT_CASES) for n in (name, f"{name}-again"))
    for first, again in zip(one, other, strict=True):
        assert first["losses"] == again["losses"]
        assert first["norms"] == again["norms"]
        for parameter, weight in first["weights"].items():
            assert torch.equal(weight, again["weights"][parameter]), parameter
        for block, memory in first["memories"].items():
            for part, tensor in memory.items():
                assert torch.equal(tensor, again["memories"][block][part]), (block, part)


OFFLOADED_LAYOUTS = {
    "data2": (2, {}),
    "data2_tied_in_chunks": (
        2,
        {
            "train.micro_batch_size": 1, "train.chunks": 2, "model.tie_embeddings": True,
            "model.memory_rule": "gated_delta",
        },
    ),
    "data4": (4, {"train.micro_batch_size": 1, "model.memory_rule": "delta"}),
}  # fmt: skip
OFFLOADED = {
    f"{dtype}-{layout}-zero{zero}-{'-'.join(what) or 'on_device'}": (
        world,
        {
            "train.dtype": dtype, "parallel.pipeline_stages": 1, "parallel.zero_stage": zero,
            **{f"parallel.offload_{each}": True for each in what}, **settings,
        },
    )
    for dtype in ("fp32", "bf16")
    for layout, (world, settings) in OFFLOADED_LAYOUTS.items()
    for zero in (1, 2, 3)
    for what in ((), ("optimizer",), ("optimizer", "weights"))
    if zero == 3 or "weights" not in what
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OFFLOADED if not name.endswith("on_device")])
def test_what_is_offloaded_agrees_with_what_is_on_the_device(results, name):
    tolerance = TOLERANCE if name.startswith("fp32") else 2e-3
    on_device = "-".join((*name.split("-")[:3], "on_device"))
    one, other = (results.of(n, OFFLOADED) for n in (on_device, name))
    for expected, offloaded in zip(one, other, strict=True):
        assert offloaded["losses"] == pytest.approx(expected["losses"], rel=tolerance)
        assert offloaded["norms"] == pytest.approx(expected["norms"], rel=tolerance)
        for parameter, weight in offloaded["weights"].items():
            assert distance(weight, expected["weights"][parameter]) < 2 * tolerance, parameter
