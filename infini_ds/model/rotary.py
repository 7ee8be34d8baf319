"""Rotary frequencies (Su et al. 2021), with the scalings that pretrained models use."""

import math

import torch
from torch import Tensor

from infini_ds.config import ModelConfig, RopeScaling


def rotary_table(config: ModelConfig, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Returns cos and sin for each position of what local attention sees, [segment_length, or twice
    as many with use_sliding_window, head_dim / 2] fp32."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    frequencies = config.rope_theta**-exponents
    if config.rope_scaling:
        frequencies = _scale(frequencies, config.rope_scaling)
    seen = config.segment_length * (2 if config.use_sliding_window else 1)
    positions = torch.arange(seen, dtype=torch.float64)
    angles = positions[:, None] * frequencies
    return angles.cos().float().to(device), angles.sin().float().to(device)


def _scale(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    # Llama 3.1 divides low frequencies by the factor, keeps high ones, and blends in between.
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((turns - scaling.low_freq_factor) / span).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor
