"""Settings of an Infini-Transformer, for transformers."""

from transformers import PretrainedConfig


class InfiniConfig(PretrainedConfig):
    """The settings in a checkpoint's config.json, with Llama's names where it has them.

    Settings beyond Llama's: `segment_length`, the number of tokens that attend to one another;
    `use_sliding_window`, whether each token attends to as many tokens, also to those of the segment
    before; `memory_rule`, `linear`, `delta`, `gated_delta` or `gated_delta_dpfp`, how a segment is
    written into the memory; `memory_layers`, the blocks that have a memory, counted from 0, None
    for all; `write_gate`, whether each token decides how much of it is written, and
    `write_gate_sees_keys`, whether that depends on the key as well; `short_conv`, how many tokens
    before them queries, keys and values see; `qk_norm`, whether each head's queries and keys are
    normalised.
    """

    model_type = "infini_transformer"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size=0,
        hidden_size=0,
        intermediate_size=0,
        num_hidden_layers=0,
        num_attention_heads=0,
        num_key_value_heads=0,
        head_dim=128,
        segment_length=2048,
        use_sliding_window=False,
        memory_rule="linear",
        memory_layers=None,
        write_gate=False,
        write_gate_sees_keys=False,
        short_conv=0,
        hidden_act="silu",
        rotary_base=10000.0,
        rotary_scaling=None,
        rms_norm_eps=1e-5,
        attention_bias=False,
        attention_out_bias=False,
        qk_norm=False,
        mlp_bias=False,
        head_bias=False,
        tie_word_embeddings=False,
        initializer_range=0.02,
        use_cache=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.segment_length = segment_length
        self.use_sliding_window = use_sliding_window
        self.memory_rule = memory_rule
        self.memory_layers = memory_layers
        self.write_gate = write_gate
        self.write_gate_sees_keys = write_gate_sees_keys
        self.short_conv = short_conv
        self.hidden_act = hidden_act
        self.rotary_base = rotary_base
        self.rotary_scaling = rotary_scaling
        self.rms_norm_eps = rms_norm_eps
        self.attention_bias = attention_bias
        self.attention_out_bias = attention_out_bias
        self.qk_norm = qk_norm
        self.mlp_bias = mlp_bias
        self.head_bias = head_bias
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        kwargs |= {
            "tie_word_embeddings": tie_word_embeddings,
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id,
        }
        super().__init__(**kwargs)
