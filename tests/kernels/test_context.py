"""A window shared by several ranks is one function: outputs, final memory and every gradient."""

import gc
import itertools
import sys
import weakref
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from infini_ds.config.model import KERNEL_RULES
from infini_ds.kernels.infini_attention import Inputs, infini_attention, op
from infini_ds.kernels.infini_attention.parallel import infini_attention_parallel
from infini_ds.kernels.infini_attention.reference import infini_attention_reference
from infini_ds.kernels.trial import begins_of, error
from infini_ds.layout import Layout
from infini_ds.memory import RULES, MemoryState
from infini_ds.memory.hand_on import Change, HandOn, Kept
from tests.kernels.exchanges import Part, on_all_parts

torch.set_num_threads(1)

DIM = 16
BATCH = 2
SEGMENTS = 8
"""Of the window, so that 4 parts have 2 each."""
GRADIENTS = ("q", "k", "v", "w", "beta", "kv", "norm")

# Segments in which a document begins, by lane. The edges of parts are 4 of two, 2, 4 and 6 of four.
BEGINNINGS = {
    "nowhere": ([], []),
    "at the window's start": ([0], [0]),
    "at edges": ([4], [2, 6]),
    "before edges": ([3], [1, 3, 5]),
    "after edges": ([5], [0, 3, 5, 7]),
    "in every segment": (list(range(SEGMENTS)), [7]),
}


class Case(NamedTuple):
    rule: str
    gated: bool
    group: int
    packed: bool
    beginnings: str
    n: int = 9


class Window(NamedTuple):
    """Tensors that receive gradients, in the order of GRADIENTS, and what does not."""

    leaves: dict[str, Tensor]
    layout: Layout
    upstream: tuple[Tensor, Tensor, Tensor]


def make_layout(case: Case) -> Layout:
    """With padding, segments without tokens and, if packed, documents behind the first."""
    random = torch.Generator().manual_seed(5)
    n = case.n
    starts = torch.zeros(BATCH, SEGMENTS, dtype=torch.bool)
    for lane, segments in enumerate(BEGINNINGS[case.beginnings]):
        starts[lane, segments] = True
    lengths = torch.full((BATCH, SEGMENTS), n, dtype=torch.int32)
    short = torch.rand(BATCH, SEGMENTS, generator=random) < 0.4
    lengths[short] = torch.randint(0, n, (int(short.sum()),), generator=random, dtype=torch.int32)
    begins = None
    if case.packed:
        ends = [[int(x), *{min(n, int(x) + 2), min(n, int(x) + 3)}] for x in lengths.flatten()]
        begins = torch.stack([begins_of(n, sorted(own)) for own in ends])
        begins = begins.view(BATCH, SEGMENTS, n)
    return Layout(starts, lengths, begins)


def make_window(case: Case) -> Window:
    random = torch.Generator().manual_seed(case.n)
    kv_heads, heads, n = 2, 2 * case.group, case.n

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    rule = RULES[case.rule]
    stored = rule.features(normal(BATCH, kv_heads, 3 * n, DIM))
    states = rule.specs(kv_heads, DIM)
    leaves = {
        "q": normal(BATCH, SEGMENTS, n, heads, DIM),
        "k": normal(BATCH, SEGMENTS, n, kv_heads, DIM),
        "v": normal(BATCH, SEGMENTS, n, kv_heads, DIM),
        "w": torch.rand(BATCH, SEGMENTS, n, kv_heads, generator=random, dtype=torch.float64),
        "beta": normal(heads),
        "kv": stored.mT @ normal(BATCH, kv_heads, 3 * n, DIM),
        "norm": stored.sum(-2)[..., : states["norm"][-1]],
    }
    if case.beginnings == "at the window's start":
        leaves["kv"], leaves["norm"] = (torch.zeros_like(leaves[x]) for x in ("kv", "norm"))
    if not case.gated:
        del leaves["w"]
    upstream = (
        normal(BATCH, SEGMENTS, n, heads, DIM),
        *(normal(BATCH, *shape) / 10 for shape in states.values()),
    )
    return Window(leaves, make_layout(case), upstream)


def run(operation, case: Case, leaves: dict[str, Tensor], layout: Layout):
    """Output and final memory."""
    angles = torch.arange(case.n)[:, None] * 10.0 ** -torch.arange(DIM // 2)
    rotary = angles.cos().to(leaves["q"]), angles.sin().to(leaves["q"])
    memory = MemoryState(leaves["kv"], leaves["norm"])
    inputs = Inputs(
        leaves["q"], leaves["k"], leaves["v"], leaves.get("w"), memory, layout, leaves["beta"],
        case.rule, rotary,
    )  # fmt: skip
    return operation(inputs)


def whole(case: Case, window: Window) -> dict[str, Tensor]:
    """The specification, on the whole window in fp64."""
    leaves = {name: x.clone().requires_grad_() for name, x in window.leaves.items()}
    out, memory = run(infini_attention_reference, case, leaves, window.layout)
    gradients = torch.autograd.grad([out, *memory], list(leaves.values()), window.upstream)
    named = {f"gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)}
    return {"output": out, "memory": memory.kv, "norm": memory.norm, **named}


def shared(case: Case, window: Window, count: int, again: bool = False) -> list[dict[str, Tensor]]:
    """What each of `count` parts computes in fp32.

    Each part's loss has its own outputs, and an equal share of the final memory. Gradients of what
    all parts have are to be summed over parts.
    """

    def work(part: Part) -> dict[str, Tensor]:
        own = slice(part.place * SEGMENTS // count, (part.place + 1) * SEGMENTS // count)
        leaves = {
            name: (x if name in ("beta", "kv", "norm") else x[:, own]).float().requires_grad_()
            for name, x in window.leaves.items()
        }
        layout = window.layout.map(lambda x: x[:, own])
        exchange = Kept(part) if again else part

        def compute(*tensors: Tensor):
            if isinstance(exchange, Kept):
                exchange.rewind()
            given = dict(zip(leaves, tensors, strict=True))
            out, memory = run(lambda x: infini_attention(x, exchange), case, given, layout)
            return out, *memory

        if again:
            found = checkpoint(
                compute, *leaves.values(), use_reentrant=False, preserve_rng_state=False
            )
        else:
            found = compute(*leaves.values())
        out, kv, norm = found
        upstream = window.upstream[0][:, own], *(x / count for x in window.upstream[1:])
        gradients = torch.autograd.grad(found, list(leaves.values()), [x.float() for x in upstream])
        named = {f"gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)}
        assert part.sent == part.sent_back[::-1], "each message is given a gradient once"
        sent = torch.tensor(sum(part.sent))
        return {"output": out, "memory": kv, "norm": norm, **named, "sent": sent}

    return on_all_parts(count, work)


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    found = {}
    for name in parts[0]:
        each = [part[name] for part in parts]
        if name in ("output", *(f"gradient of {x}" for x in ("q", "k", "v", "w"))):
            found[name] = torch.cat(each, dim=1)
        elif name.startswith("gradient"):
            found[name] = torch.stack(each).sum(0)
        else:
            found[name] = each[-1]
    return found


CASES = [
    Case(rule, gated, group, packed, beginnings)
    for rule, beginnings, (gated, group, packed) in itertools.product(
        RULES,
        BEGINNINGS,
        [(False, 1, False), (True, 3, True)],
    )
]


def check_parts(case: Case, count: int, tolerance: float) -> None:
    """Compares the parts of a window, put together, with the specification."""
    window = make_window(case)
    expected = whole(case, window)
    parts = shared(case, window, count)
    actual = joined(parts)
    for name, want in expected.items():
        slack = 3 if name == "gradient of beta" else 1
        if want.norm() == 0:
            assert actual[name].norm() == 0, name
        else:
            assert error(want, actual[name]) <= slack * tolerance, name
    for part in parts:
        assert torch.equal(part["memory"], parts[0]["memory"])
        assert torch.equal(part["norm"], parts[0]["norm"])


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_parts_are_one_window(case, count):
    check_parts(case, count, 1e-5)


@pytest.mark.usefixtures("_fp64")
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_parts_are_one_window_in_fp64(case, count):
    check_parts(case, count, 1e-10)


HARDEST = [
    Case(rule, True, 3, True, beginnings)
    for rule, beginnings in itertools.product(RULES, ("nowhere", "before edges"))
]


@pytest.mark.parametrize("case", HARDEST, ids=lambda case: "-".join(map(str, case)))
def test_a_part_that_is_computed_again_sends_nothing_again(case):
    window = make_window(case)
    once, twice = shared(case, window, 4), shared(case, window, 4, again=True)
    for first, second in zip(once, twice, strict=True):
        for name, tensor in first.items():
            assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("rule", RULES)
def test_all_parts_take_part_in_the_backward_pass_of_a_last_chunk(rule):
    """Its final memory gets no gradient, so the first part depends on no other."""
    case = Case(rule, True, 1, False, "nowhere")
    window = make_window(case)
    expected = {name: x.float().requires_grad_() for name, x in window.leaves.items()}
    run(infini_attention, case, expected, window.layout)[0].sum().backward()

    def work(part: Part) -> Tensor:
        own = slice(part.place * SEGMENTS // 2, (part.place + 1) * SEGMENTS // 2)
        leaves = {
            name: (x if name in ("beta", "kv", "norm") else x[:, own]).float().requires_grad_()
            for name, x in window.leaves.items()
        }
        layout = window.layout.map(lambda x: x[:, own])
        out, _ = run(lambda x: infini_attention(x, part), case, leaves, layout)
        out.sum().backward()
        assert len(part.sent_back) == len(part.sent)
        assert leaves["k"].grad is not None
        return leaves["k"].grad

    actual = torch.cat(on_all_parts(2, work), dim=1)
    assert expected["k"].grad is not None
    assert error(expected["k"].grad, actual) < 1e-5


@pytest.mark.parametrize("rule", RULES)
def test_what_is_kept_goes_with_the_graph(rule):
    """At once, and not only when garbage is searched for."""
    case = Case(rule, True, 1, False, "nowhere")
    window = make_window(case)
    leaves = {name: x.float().requires_grad_() for name, x in window.leaves.items()}
    (part,) = on_all_parts(1, lambda part: part)

    def loss_and_gathered() -> tuple[Tensor, list[weakref.ref]]:
        kept = Kept(part)
        for _ in range(2):
            kept.rewind()
            out, _ = run(lambda x: infini_attention(x, kept), case, leaves, window.layout)
        return out.sum(), [weakref.ref(tensor) for tensor in kept._gathered]

    gc.collect()
    gc.disable()
    try:
        loss, gathered = loss_and_gathered()
        assert len(gathered) == (2 if rule == "delta" else 1)
        del loss
        assert not any(reference() is not None for reference in gathered)
    finally:
        gc.enable()


@pytest.mark.parametrize("rule", RULES)
def test_numbers_handed_on_are_those_of_the_rule(rule):
    case = Case(rule, True, 3, False, "at edges")
    for part in shared(case, make_window(case), 2):
        assert part["sent"] == BATCH * RULES[rule].handed_on(2, DIM)


@pytest.mark.parametrize(
    "case",
    [case for case in HARDEST if case.rule in KERNEL_RULES],
    ids=lambda case: "-".join(map(str, case)),
)
def test_kernels_get_the_memory_before_their_part(case, monkeypatch):
    """With PyTorch in the place of Triton, which sees nothing of other parts."""
    window = make_window(case)
    expected = joined(shared(case, window, 2))
    monkeypatch.setattr(op, "uses_triton", lambda *_: True)
    monkeypatch.setattr("infini_ds.kernels.self_check.check", lambda *_: None)
    triton = "infini_ds.kernels.infini_attention.triton.op"
    stand_in = SimpleNamespace(infini_attention_triton=lambda x: infini_attention_parallel(x))
    monkeypatch.setitem(sys.modules, triton, stand_in)
    for name, actual in joined(shared(case, window, 2)).items():
        assert error(expected[name], actual) <= 2e-6, name


@pytest.mark.parametrize("rule", RULES)
def test_nothing_flows_from_one_document_to_another(rule):
    """Neither forward nor back, across the edge of parts."""
    case = Case(rule, True, 1, True, "nowhere")
    window = make_window(case)
    window.layout.starts[:, SEGMENTS // 2] = True
    kv = window.leaves["kv"]
    first, second = shared(case, window, 2)
    assert first["gradient of kv"].norm() > 0
    assert second["gradient of kv"].norm() == 0
    window.leaves["kv"] = 2 * kv
    window.leaves["k"][:, : SEGMENTS // 2] += 1
    other_first, other_second = shared(case, window, 2)
    assert not torch.equal(first["output"], other_first["output"])
    for name in ("output", "memory", "norm", "gradient of k", "gradient of v", "gradient of w"):
        assert torch.equal(second[name], other_second[name]), name


def random_maps(factors: str, segments: int) -> tuple[Tensor, Tensor]:
    """A and B of each segment, [segments, batch, ...]; some A are 0."""
    random = torch.Generator().manual_seed(2)
    begins = torch.rand(segments, BATCH, generator=random) < 0.2
    factor = torch.ones(segments, BATCH, dtype=torch.float64)
    if factors == "matrices":
        factor = torch.randn(segments, BATCH, 2, DIM, DIM, generator=random, dtype=torch.float64)
        factor /= DIM**0.5
    factor[begins] = 0
    return factor, torch.randn(segments, BATCH, 2, DIM, DIM, generator=random, dtype=torch.float64)


@pytest.mark.parametrize("factors", ["flags", "matrices"])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_any_affine_map_is_handed_on(factors, count):
    """As one after another, with the gradient of every map, in fp64."""
    tensors = [*random_maps(factors, count), torch.ones(BATCH, 2, DIM, DIM, dtype=torch.float64)]
    upstream = torch.randn(count, BATCH, 2, DIM, DIM, dtype=torch.float64)

    factor, added, incoming = (x.clone().requires_grad_() for x in tensors)
    states = [incoming]
    for own_factor, own_added in zip(factor, added, strict=True):
        kept = own_factor.view(BATCH, 1, 1, 1) * states[-1] if factors == "flags" else (
            own_factor @ states[-1]
        )  # fmt: skip
        states.append(kept + own_added)
    wanted = [factor, added, incoming][factors == "flags" :]
    loss = (torch.stack(states[:-1]) * upstream).sum() + states[-1].square().sum()
    expected = torch.autograd.grad(loss, wanted)

    def work(part: Part) -> list[Tensor]:
        own_factor, own_added = (x[part.place].clone().requires_grad_() for x in tensors[:2])
        own_incoming = tensors[2].clone().requires_grad_()
        change = Change(own_factor.detach() if factors == "flags" else own_factor, [own_added])
        (before,), (after,) = HandOn(change, part).finish([own_incoming])
        assert torch.allclose(before, states[part.place], rtol=1e-10, atol=1e-12)
        assert torch.allclose(after, states[-1], rtol=1e-10, atol=1e-12)
        loss = (before * upstream[part.place]).sum() + after.square().sum() / count
        own = [own_factor, own_added, own_incoming][factors == "flags" :]
        return list(torch.autograd.grad(loss, own))

    *own, incoming_gradients = zip(*on_all_parts(count, work), strict=True)
    actual = [*(torch.stack(x) for x in own), torch.stack(incoming_gradients).sum(0)]
    for want, have in zip(expected, actual, strict=True):
        assert torch.allclose(have, want, rtol=1e-10, atol=1e-10)
