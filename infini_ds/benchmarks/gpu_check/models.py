"""Measures whole models: training steps, ours and the peer's, and documents up to 1M tokens."""

import time
from typing import Any

import torch

from infini_ds.benchmarks import kernels_model
from infini_ds.benchmarks.cuda_timer import CudaTimer
from infini_ds.benchmarks.gpu_check.correctness import ours
from infini_ds.benchmarks.gpu_check.results import Part
from infini_ds.benchmarks.gpu_check.times import timer_of
from infini_ds.benchmarks.kernels_timing import Shape, time_full_attention
from infini_ds.config import ModelConfig
from infini_ds.model.transformer import InfiniTransformer

SMALL = ModelConfig(
    hidden_size=32, num_layers=1, num_heads=2, head_dim=16, segment_length=16, vocab_size=64
)
SEGMENTS = 16
DOCUMENTS = (16, 64, 512)
"""Numbers of segments of 2,048 tokens: 32 thousand, 131 thousand and a million tokens in all."""
FULL_TOKENS = (32_768, 131_072)
MILLION = 1_048_576


def models(part: Part) -> None:
    """Times training steps on one window; the peer's first, beside ours of the same sizes."""
    small = kernels_model.Models(SMALL, SMALL, SMALL)
    segments = 2 if part.tiny else SEGMENTS
    chosen = kernels_model.contestants(small if part.tiny else kernels_model.Models(), segments)
    timer = timer_of(part, hides_host=False, seconds=2.0)
    for contestant in reversed([each for each in chosen if not each.once]):
        if part.late():
            part.note("models", name=contestant.name, skipped="no time left")
            continue
        _reset_peak(part)
        began = time.monotonic()
        try:
            row = kernels_model.time_step(contestant, part.device, timer)
        except (RuntimeError, ValueError, TypeError) as error:  # the peer on a newer torch
            row = {"name": contestant.name, "error": f"{type(error).__name__}: {error}"[:300]}
        took = round(time.monotonic() - began, 1)
        part.note("models", **row, peak_gib=_peak(part), all_seconds=took)


def sweep(part: Part) -> None:
    """Measures infini_1b on one document, window by window, then the operation beside attention.

    It records speed and memory by the length of the document.
    """
    config = SMALL if part.tiny else kernels_model.LARGE
    window = 2 if part.tiny else SEGMENTS
    model = InfiniTransformer(config).to(part.device, torch.bfloat16)
    model.backward(_tokens(config, window, part), window_segments=window)  # compiles
    for segments in (4, 8) if part.tiny else DOCUMENTS:
        if part.late():
            return
        tokens = _tokens(config, segments, part)
        _reset_peak(part)
        model.zero_grad()
        began = time.perf_counter()
        loss = float(model.backward(tokens, window_segments=window))
        took = time.perf_counter() - began
        count = segments * config.segment_length
        part.note(
            "document", model="infini_1b", tokens=count, seconds=took,
            tokens_per_second=count / took, peak_gib=_peak(part), loss=loss,
        )  # fmt: skip
    del model
    timer = timer_of(part, seconds=1.0)
    for tokens in (64,) if part.tiny else FULL_TOKENS:
        if not part.late():
            part.note("full", **time_full_attention(*_full(part, tokens), timer))


def million(part: Part) -> None:
    """Times the operation on a million tokens, and full attention once, which takes about 20 s."""
    timer = timer_of(part) if part.tiny else CudaTimer().once
    row = time_full_attention(*_full(part, 64 if part.tiny else MILLION), timer)
    part.note("full", **row, once=True)


def _full(part: Part, tokens: int) -> tuple[Any, int, Shape, str]:
    shape = Shape(2, 32, 2, 16) if part.tiny else Shape(SEGMENTS, 2048, 32, 128)
    return ours(part), tokens, shape, part.device


def _tokens(config: ModelConfig, segments: int, part: Part) -> torch.Tensor:
    size = (1, segments * config.segment_length + 1)
    return torch.randint(config.vocab_size, size, device=part.device)


def _reset_peak(part: Part) -> None:
    if not part.tiny:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak(part: Part) -> float | None:
    return None if part.tiny else round(torch.cuda.max_memory_allocated() / 2**30, 2)
