"""Weights of `infini-transformer-pytorch`, the library this project started from.

What differs: its fused projection orders query, key, value blocks as ours; its rotary pairs
neighbouring channels where ours pairs the two halves of a head; its gates weight the local side
(beta = -gate); its feed-forward puts the value before the gate; its biases are all on except in
attention. Attention of the two has the same function when channels of queries and keys are
permuted together, and the memory's d_k axis with them.
"""

import torch
from torch import Tensor

from infini_ds.config import ModelConfig


def from_seed(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The seed library's state_dict as ours.

    config must describe the same model: hidden_act "gelu", mlp_bias and head_bias true,
    intermediate_size int(4 x hidden_size x 2 / 3), norm_eps tiny.
    """
    order = half_order(config.head_dim)
    ours = {"layers.0.weight": state["token_emb.weight"]}
    for index in range(config.num_layers):
        theirs, mine = f"layers.{index}", f"layers.{index + 1}"
        q, k, v = state[f"{theirs}.0.to_qkv.weight"].chunk(3)
        q, k = (_permute_heads(weight, order) for weight in (q, k))
        ours |= {
            f"{mine}.input_layernorm.weight": state[f"{theirs}.0.norm.gamma"],
            f"{mine}.self_attn.qkv_proj.weight": torch.cat((q, k, v)),
            f"{mine}.self_attn.o_proj.weight": state[f"{theirs}.0.to_out.weight"],
            f"{mine}.self_attn.beta": -state[f"{theirs}.0.fastweight_mem.head_gates"],
            f"{mine}.post_attention_layernorm.weight": state[f"{theirs}.1.norm.gamma"],
            f"{mine}.mlp.down_proj.weight": state[f"{theirs}.1.proj_out.weight"],
            f"{mine}.mlp.down_proj.bias": state[f"{theirs}.1.proj_out.bias"],
        }
        for kind in ("weight", "bias"):
            up, gate = state[f"{theirs}.1.proj_in.{kind}"].chunk(2)
            ours[f"{mine}.mlp.gate_up_proj.{kind}"] = torch.cat((gate, up))
    last = config.num_layers + 1
    ours[f"layers.{last}.weight"] = state["norm.gamma"]
    ours[f"layers.{last + 1}.weight"] = state["to_logits.weight"]
    ours[f"layers.{last + 1}.bias"] = state["to_logits.bias"]
    return ours


def half_order(head_dim: int) -> Tensor:
    """Where each channel of ours lies in a head of theirs: even channels first, then odd."""
    return torch.cat((torch.arange(0, head_dim, 2), torch.arange(1, head_dim, 2)))


def _permute_heads(weight: Tensor, order: Tensor) -> Tensor:
    return weight.unflatten(0, (-1, len(order)))[:, order].flatten(0, 1)
