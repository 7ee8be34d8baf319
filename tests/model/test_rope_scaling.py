"""Rotary tables against those of Hugging Face transformers."""

import pytest
import torch

from infini_ds.config import RopeScaling
from infini_ds.model.rotary import rotary_table
from tests import tiny

SCALINGS = {
    "none": None,
    "linear": RopeScaling(rope_type="linear", factor=4.0),
    "llama3": RopeScaling(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_rotary_table_equals_transformers(name):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = SCALINGS[name]
    config = tiny.model_config(
        head_dim=64, segment_length=512, rope_theta=500000.0, rope_scaling=scaling
    )
    settings = {
        "hidden_size": 64,
        "num_attention_heads": 1,
        "head_dim": 64,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
        "rope_scaling": scaling and scaling.model_dump(),
    }
    theirs = LlamaRotaryEmbedding(LlamaConfig(**settings))
    cos, sin = theirs(torch.zeros(1), torch.arange(512)[None])
    our_cos, our_sin = rotary_table(config, "cpu")
    # Theirs multiplies positions and frequencies in fp32: angles near 512 are off by about 3e-5.
    torch.testing.assert_close(our_cos, cos[0, :, :32], rtol=0, atol=1e-4)
    torch.testing.assert_close(our_sin, sin[0, :, :32], rtol=0, atol=1e-4)
