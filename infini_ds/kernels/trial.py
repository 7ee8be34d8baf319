"""A small window with every case of Infini-attention, to compare ways of computing it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from infini_ds.kernels.infini_attention.reference import Inputs
from infini_ds.layout import Layout
from infini_ds.memory import RULES, MemoryState

Operation = Callable[[Inputs], tuple[Tensor, MemoryState]]
"""A way to compute Infini-attention, such as `infini_attention_reference`."""

OUTPUTS = ("output", "memory", "norm of the memory")
GRADIENTS = tuple(
    f"gradient of {name}"
    for name in ("q", "k", "v", "the write weights", "the memory", "its norm", "beta")
)
SLIDING_GRADIENT = "gradient of the segments before"
STORED_TOKENS = 64
"""Tokens already stored of the documents that continue from an earlier window."""
WIDER = 16
"""By how many tokens the segments before are longer, as they may be where there is only one."""
ROW_SLACK = 8.0
"""A single row's relative error may be this many times that of all rows together."""


class Trial(NamedTuple):
    """The sizes of the window, and the kernels' type, bf16 or fp32."""

    rule: str
    heads: int
    kv_heads: int
    head_dim: int
    segment_length: int
    dtype: str = "bf16"
    packed: bool = False
    """Whether whole documents follow the first one of some segments."""
    sliding: bool = False
    """Whether tokens attend to the segment before, too."""


class Window(NamedTuple):
    """Three segments of two lanes; all numbers but the memory's are exact in bf16."""

    qkv: Tensor
    """[batch, segments, n, heads + 2 kv_heads, d], one projection, sliced as in a model."""
    w: Tensor
    memory: MemoryState
    beta: Tensor
    upstream: list[Tensor]
    """Gradients of the outputs."""
    previous: Tensor | None
    """Of a sliding window, as in `Inputs`."""


def make_window(trial: Trial) -> Window:
    """Makes the same numbers every time, independently of PyTorch's global generator."""
    rule, heads, kv_heads, d, n, *_ = trial
    features = RULES[rule].features
    random = torch.Generator().manual_seed(n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).bfloat16().float()

    qkv = normal(2, 3, n, heads + 2 * kv_heads, d)
    w = torch.rand(2, 3, n, kv_heads, generator=random).bfloat16().float()
    stored_k = features(normal(2, kv_heads, STORED_TOKENS, d))
    kv, norm = stored_k.mT @ normal(2, kv_heads, STORED_TOKENS, d), stored_k.sum(-2)
    states = RULES[rule].specs(kv_heads, d)
    memory = MemoryState(kv, norm[..., : states["norm"][-1]])
    upstream = [normal(2, 3, n, heads, d), *(normal(2, *shape) for shape in states.values())]
    beta = normal(heads)
    previous = None
    if trial.sliding:
        previous = normal(2, 3, n + WIDER, 2 * kv_heads, d)
        starts = make_layout(n, "cpu").starts
        previous = previous.masked_fill_(starts[..., None, None, None], 0)
        previous[0, 0, : n // 2] = 0  # a document that began inside the segment before
        previous[1, 1, n // 2 :] = 0  # padding
    return Window(qkv, w, memory, beta, upstream, previous)


def make_layout(n: int, device: torch.device | str, packed: bool = False) -> Layout:
    """Makes a layout that covers every case.

    It has carried and empty memories, a document that starts inside the window, padding, and a
    segment without tokens. If packed, it also has documents behind the first: of one token, of
    many, from a tile's edge, before padding, and up to the segment's end.
    """
    third, half = -(-n // 3), -(-n // 2)
    starts = torch.tensor([[False, False, True], [True, False, False]])
    lengths = torch.tensor([[n, n, third], [half, n, 0]], dtype=torch.int32)
    if not packed:
        return Layout(starts.to(device), lengths.to(device))
    lengths[0, 1] = n - third
    edge = 8 * n // 17  # 128 of 272, where kernels have a tile's edge
    ends = [
        [[n], [n - third, n - third + 1, n - n // 8, n], [third, third + 1, edge, n - n // 8]],
        [[half, n], [n], []],
    ]
    begins = torch.stack([torch.stack([begins_of(n, own) for own in lane]) for lane in ends])
    return Layout(starts.to(device), lengths.to(device), begins.to(device))


def begins_of(n: int, ends: list[int]) -> Tensor:
    """Layout.begins of one segment, int32 [n], whose documents end at these positions."""
    begins = torch.full((n,), n, dtype=torch.int32)
    first = 0
    for end in ends:
        begins[first:end] = first
        first = end
    return begins


def results(
    operation: Operation,
    trial: Trial,
    window: Window,
    device: torch.device | str,
    dtype: torch.dtype,
    state: torch.dtype = torch.float32,
    gradients: bool = True,
) -> dict[str, Tensor]:
    """Computes OUTPUTS, and if wanted GRADIENTS and SLIDING_GRADIENT, on the device.

    Args:
        dtype: type of queries, keys, values and beta.
        state: type of memories, write weights and rotary tables.
    """
    rule, heads, kv_heads, d, n, *_ = trial
    with torch.inference_mode(False), torch.set_grad_enabled(gradients):
        given = [
            (window.qkv, dtype), (window.w, state), *((x, state) for x in window.memory),
            (window.beta, dtype), *([] if window.previous is None else [(window.previous, dtype)]),
        ]  # fmt: skip
        leaves = [x.to(device, kind).requires_grad_(gradients) for x, kind in given]
        qkv, w, kv, norm, beta, *previous = leaves
        q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=3)
        positions = torch.arange(2 * n + WIDER if previous else n)
        angles = positions[:, None] * 1e4 ** -torch.linspace(0, 1, d // 2)
        rotary = angles.cos().to(device, state), angles.sin().to(device, state)
        memory, layout = MemoryState(kv, norm), make_layout(n, device, trial.packed)
        out, after = operation(Inputs(q, k, v, w, memory, layout, beta, rule, rotary, *previous))
        found = [out, *after]
        if gradients:
            upstream = [x.to(y) for x, y in zip(window.upstream, found, strict=True)]
            found += torch.autograd.grad(found, (q, k, v, *leaves[1:]), upstream)
    names = (*OUTPUTS, *GRADIENTS, SLIDING_GRADIENT)
    return dict(zip(names, (x.detach() for x in found), strict=False))


def error(expected: Tensor, actual: Tensor) -> float:
    """Computes the relative error of a result, infinite if a number is not finite.

    It is the error of all rows together, or that of the worst row divided by ROW_SLACK if that is
    larger, since one wrong row would be hidden by thousands of right ones. A row smaller than the
    average is measured against the average size.
    """
    if not expected.numel():
        return 0.0
    wanted = expected.double()
    off = (actual.double() - wanted).norm(dim=-1)
    size = wanted.norm(dim=-1)
    mean = size.square().mean().sqrt()
    worst = (off / torch.maximum(size, mean).clamp(min=1e-30)).max() / ROW_SLACK
    whole = off.norm() / size.norm().clamp(min=1e-30)
    share = torch.maximum(whole, worst).item()
    return share if share < float("inf") else float("inf")  # NaN becomes infinite too
