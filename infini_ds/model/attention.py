"""The attention layer: projections around Infini-attention."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from infini_ds.config import ModelConfig
from infini_ds.kernels.infini_attention import LayerMemory, infini_attention
from infini_ds.kernels.infini_attention.memory_read import read_and_mix
from infini_ds.kernels.infini_attention.parallel import memory_scan
from infini_ds.kernels.local_attention import rotate
from infini_ds.layout import Layout
from infini_ds.model.rotary import rotary_table


class InfiniAttention(nn.Module):
    """Local attention inside a segment and a read of the memory of all earlier ones."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        heads = config.num_heads + 2 * config.kv_heads
        self.qkv_proj = nn.Linear(
            config.hidden_size, heads * config.head_dim, bias=config.attention_bias
        )
        self.o_proj = nn.Linear(
            config.num_heads * config.head_dim, config.hidden_size, bias=config.attention_out_bias
        )
        self.beta = nn.Parameter(torch.full((config.num_heads,), config.gate_init))
        self._rotary: tuple[Tensor, Tensor] | None = None

    def forward(
        self, hidden: Tensor, layout: Layout, memory: LayerMemory
    ) -> tuple[Tensor, LayerMemory]:
        """Whole segments at once.

        hidden [batch, segments x n, hidden_size], where n is segment_length, or anything shorter
        for a single segment. Returns the same shape, and the memory after the last segment.
        """
        segments = layout.starts.shape[1]
        q, k, v = self._project(hidden)
        q, k, v = (rearrange(x, "b (s n) h d -> b s n h d", s=segments) for x in (q, k, v))
        cos, sin = self._rotary_table(hidden.device)
        rotary = cos[: q.shape[2]], sin[: q.shape[2]]
        out, memory = infini_attention(
            q, k, v, None, memory, layout, self.beta, self.config.memory_rule, rotary
        )
        return self.o_proj(rearrange(out, "b s n h d -> b (s n) (h d)")), memory

    def extend(
        self,
        hidden: Tensor,
        memory: LayerMemory,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A few more tokens of a segment that is not full yet; nothing is written to the memory.

        Args:
            hidden: [batch, t, hidden_size].
            memory: as it was before the segment.
            keys, values: [batch, n, kv_heads, d], the segment so far, before rotary.
            positions: [batch, t], places of the new tokens in the segment.

        Returns:
            The output, and keys and values with the new tokens in place.
        """
        q, k, v = self._project(hidden)
        index = positions[..., None, None].expand_as(k)
        keys, values = keys.scatter(1, index, k), values.scatter(1, index, v)
        used = int(positions.max()) + 1
        cos, sin = self._rotary_table(hidden.device)
        causal = torch.arange(used, device=hidden.device) <= positions[..., None]  # [b, t, used]
        a_dot = F.scaled_dot_product_attention(
            rearrange(rotate(q, cos[positions], sin[positions]), "b t h d -> b h t d"),
            rearrange(rotate(keys[:, :used], cos[:used], sin[:used]), "b n h d -> b h n d"),
            rearrange(values[:, :used], "b n h d -> b h n d"),
            attn_mask=causal[:, None],
            enable_gqa=self.config.num_heads != self.config.kv_heads,
        )
        states = LayerMemory(memory.kv[:, None], memory.norm[:, None])
        a_dot = rearrange(a_dot, "b h t d -> b 1 t h d")
        out = read_and_mix(a_dot, q[:, None], states, self.beta)
        return self.o_proj(rearrange(out, "b 1 t h d -> b t (h d)")), keys, values

    def close(self, memory: LayerMemory, keys: Tensor, values: Tensor) -> LayerMemory:
        """Writes a full segment, keys and values [batch, n, kv_heads, d], into the memory."""
        batch, n = keys.shape[:2]
        layout = Layout(
            torch.zeros(batch, 1, dtype=torch.bool, device=keys.device),
            torch.full((batch, 1), n, dtype=torch.int32, device=keys.device),
        )
        rule = self.config.memory_rule
        return memory_scan(keys[:, None], values[:, None], None, memory, layout, rule)[1]

    def _project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads, kv_heads = self.config.num_heads, self.config.kv_heads
        qkv = rearrange(self.qkv_proj(hidden), "b t (h d) -> b t h d", d=self.config.head_dim)
        return qkv.split((heads, kv_heads, kv_heads), dim=2)

    def _rotary_table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._rotary is None or self._rotary[0].device != device:
            self._rotary = rotary_table(self.config, device)
        return self._rotary
