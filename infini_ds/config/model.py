"""The Infini-Transformer itself."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from infini_ds.config.settings import SMALLEST_EPSILON, Settings

LARGEST_GATE = 10000.0
"""Largest beta of the gates: its sigmoid is 0 or 1 long before, and every type can hold it."""
KERNEL_RULES = ("linear", "delta", "gated_delta")
"""The memory rules for which Triton kernels are written."""
_LARGEST_SIZE = 2**20


class RopeScaling(Settings):
    """How rotary frequencies are changed for models pretrained with scaled positions."""

    rope_type: Literal["linear", "llama3"] = "linear"
    """`linear` divides all frequencies by `factor`; `llama3` only the low ones (Llama 3.1)."""
    factor: float = Field(default=1.0, gt=0)
    """The (low) frequencies are divided by this."""
    low_freq_factor: float = Field(default=1.0, gt=0)
    """`llama3`: wavelengths above original_max_position_embeddings / this are fully scaled."""
    high_freq_factor: float = 4.0
    """`llama3`: wavelengths below original_max_position_embeddings / this are left alone."""
    original_max_position_embeddings: int = Field(default=8192, gt=0)
    """`llama3`: the context length of the model before scaling."""

    @model_validator(mode="after")
    def _check(self) -> "RopeScaling":
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor ({self.high_freq_factor}) must be above low_freq_factor "
                f"({self.low_freq_factor})"
            )
        return self


class MemoryConfig(Settings):
    """Extensions of the paper: which layers have memories, and what is learnt about writing."""

    layers: tuple[int, ...] | None = None
    """Which layers have memories, counted from 0, such as [0]; null: all. Others attend locally."""
    write_gate: bool = False
    """Each token decides how much of it is written into the memory of each key-value head."""
    write_gate_sees_keys: bool = False
    """The gate also sees the key to write, and so, with short_conv, the tokens before its own."""
    write_penalty: float = Field(default=0.0, ge=0)
    """With write_gate, the loss gets this times the mean write weight, summed over layers."""
    short_conv: int = Field(default=0, ge=0, le=64)
    """How many tokens before it each token's queries, keys and values see: a causal convolution."""

    @field_validator("layers", mode="before")
    @classmethod
    def _layers(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return (value,)
        if value is not None and not isinstance(value, list | tuple):
            raise ValueError(f"({value}) must be a list of layers, such as [0], or null")
        return tuple(value) if isinstance(value, list) else value

    @field_validator("short_conv", mode="before")
    @classmethod
    def _taps(cls, value: Any) -> Any:
        # Configs and checkpoints of earlier versions say whether there is one.
        return (4 if value else 0) if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _check(self) -> "MemoryConfig":
        if self.write_penalty and not self.write_gate:
            raise ValueError(
                f"write_penalty ({self.write_penalty}) must be 0 when write_gate is false"
            )
        if self.write_gate_sees_keys and not self.write_gate:
            raise ValueError("write_gate_sees_keys (true) must be false when write_gate is false")
        return self


class ModelConfig(Settings):
    """The Infini-Transformer itself; names are Hugging Face's where one exists."""

    vocab_size: int = Field(default=0, ge=0)
    """Number of token ids. In a run's config, 0 takes it from the token store."""
    hidden_size: int = Field(ge=1, le=_LARGEST_SIZE)
    """Width of the residual stream."""
    num_layers: int = Field(ge=1, le=_LARGEST_SIZE)
    """Number of Transformer blocks."""
    num_heads: int = Field(ge=1, le=_LARGEST_SIZE)
    """Query heads per layer."""
    num_kv_heads: int = Field(default=0, ge=0)
    """Key-value heads per layer, each with one compressive memory; 0 means `num_heads`."""
    head_dim: int = Field(default=128, ge=1, le=_LARGEST_SIZE)
    """Width of a head (d). Wider heads remember more: a memory has d x d numbers, or 6 d x d."""
    intermediate_size: int = Field(default=0, ge=0)
    """Width of the gated feed-forward; 0 means 8/3 of hidden_size, rounded up to 64."""
    segment_length: int = Field(default=2048, ge=1, le=_LARGEST_SIZE)
    """Tokens of one segment (n): local attention stays inside it, the memory spans all of them."""
    use_sliding_window: bool = False
    """Local attention sees the segment before too: each token attends to segment_length tokens."""
    memory_rule: Literal["linear", "delta", "gated_delta", "gated_delta_dpfp"] = "linear"
    """How segments are written: eq. (4), (5), the gated delta rule, or that with 6 d features."""
    memory: MemoryConfig = MemoryConfig()
    """Extensions of the paper: which layers have memories, and what is learnt about writing."""
    hidden_act: Literal["silu", "gelu"] = "silu"
    """Gate of the feed-forward: `silu` is SwiGLU, `gelu` is GEGLU."""
    rope_theta: float = Field(default=10000.0, ge=1)
    """Base of the rotary frequencies; positions restart at 0 in each segment."""
    rope_scaling: RopeScaling | None = None
    """Scaling of the rotary frequencies, for pretrained models that need it."""
    norm_eps: float = Field(default=1e-5, ge=SMALLEST_EPSILON, le=1)
    """Epsilon of the RMS norms."""
    tie_embeddings: bool = False
    """The output head shares the embedding's weight."""
    attention_bias: bool = False
    """Biases on the query, key and value projections."""
    attention_out_bias: bool = False
    """Bias on the attention's output projection."""
    qk_norm: bool = False
    """RMS norm of each head's queries and keys, before rotary and for the memory too (Qwen3)."""
    mlp_bias: bool = False
    """Biases in the feed-forward."""
    head_bias: bool = False
    """Bias on the output head (not with tie_embeddings)."""
    gate_init: float = Field(default=0.0, ge=-LARGEST_GATE, le=LARGEST_GATE)
    """Initial beta of the gates: the memory's share of a head's output is sigmoid(beta)."""
    initializer_range: float = Field(default=0.02, ge=0, le=100)
    """Standard deviation of initial weights; those that end a branch are divided by sqrt(2 L)."""
    embedding_initializer_range: float = Field(default=0.0, ge=0, le=100)
    """Standard deviation of the initial embedding; 0 means initializer_range."""

    @property
    def has_kernels(self) -> bool:
        """Whether Triton kernels are written for the memory rule."""
        return self.memory_rule in KERNEL_RULES

    @property
    def memory_layers(self) -> range | tuple[int, ...]:
        """The layers that have memories, counted from 0, with the default resolved."""
        layers = self.memory.layers
        return range(self.num_layers) if layers is None else layers

    def of_layer(self, layer: int) -> "ModelConfig":
        """Returns the config of models whose layers are all like this one's layer of this number:
        they have memories, or none has. Functions of one layer take such a config."""
        if self.memory.layers is None:
            return self
        layers = None if layer in self.memory.layers else ()
        return self._with_memory_layers(layers)

    def of_blocks(self, blocks: range) -> "ModelConfig":
        """Returns the config of a model that has only these consecutive layers of this one."""
        layers = self.memory.layers
        if layers is not None:
            layers = tuple(layer - blocks.start for layer in layers if layer in blocks)
        return self._with_memory_layers(layers).model_copy(update={"num_layers": len(blocks)})

    def _with_memory_layers(self, layers: tuple[int, ...] | None) -> "ModelConfig":
        memory = self.memory.model_copy(update={"layers": layers})
        return self.model_copy(update={"memory": memory})

    @property
    def kv_heads(self) -> int:
        """Key-value heads, with the default resolved."""
        return self.num_kv_heads or self.num_heads

    @property
    def mlp_size(self) -> int:
        """Width of the feed-forward, with the default resolved."""
        return self.intermediate_size or -(-8 * self.hidden_size // (3 * 64)) * 64

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.memory.short_conv > self.segment_length:
            raise ValueError(
                f"memory.short_conv ({self.memory.short_conv}) must be at most segment_length "
                f"({self.segment_length})"
            )
        layers = self.memory.layers or ()
        if list(layers) != sorted(set(layers) & set(range(self.num_layers))):
            raise ValueError(
                f"memory.layers ({list(layers)}) must be numbers from 0 to {self.num_layers - 1}, "
                "smaller ones first"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.kv_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even, for rotary positions")
        if self.tie_embeddings and self.head_bias:
            raise ValueError("head_bias must be false when tie_embeddings is true")
        return self
