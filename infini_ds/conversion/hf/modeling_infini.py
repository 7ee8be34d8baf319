"""An Infini-Transformer (arXiv 2404.07143) for transformers; its layers are in layers_infini.py."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.generic import TransformersKwargs

from .configuration_infini import InfiniConfig
from .layers_infini import InfiniBlock, LayerState, ShortConv

# Arguments of `generate` meant for the model; they are passed on, and refused there if unknown.
_ASKED = ("use_cache", "logits_to_keep", "position_ids", *TransformersKwargs.__optional_keys__)

# This table of names tells the Trainer to shift labels when it smooths them, and pipelines that
# they can take the model.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(InfiniConfig.model_type, "InfiniForCausalLM")


@dataclass
class InfiniCache:
    """The state that the model keeps of a text; its size does not depend on the text's length.

    Pass it to another call of the model to continue the text. `generate` needs all tokens of the
    text, but does not read those in the cache again. A call changes the cache; copy.deepcopy keeps
    one as it is, for several questions about one text. Beams and several answers need a row each,
    which `batch_repeat_interleave` makes from the existing rows.
    """

    layers: list[LayerState] = field(default_factory=list)
    tokens: int = 0  # number read so far
    rows: int = 0  # number of texts in the batch
    is_compileable = False
    is_croppable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for layer in self.layers:
            layer.select(beam_idx)
        self.rows = len(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(self.rows).repeat_interleave(repeats))

    def crop(self, *args, **kwargs) -> None:
        raise NotImplementedError("an InfiniCache cannot be cropped: what was read stays read")


class InfiniForCausalLM(PreTrainedModel, GenerationMixin):
    """The model. Its layers are embedding, blocks, final norm, and a head unless it is tied."""

    config_class = InfiniConfig
    _no_split_modules = ["InfiniBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _is_stateful = True  # tokens that were read cannot be taken back
    _supports_sdpa = True
    _supports_context_parallel = False  # the memory would have to be passed between ranks
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # a micro-batch's loss is divided by num_items_in_batch

    def __init__(self, config: InfiniConfig):
        super().__init__(config)
        layers: list[nn.Module] = [nn.Embedding(config.vocab_size, config.hidden_size)]
        layers += [InfiniBlock(config) for _ in range(config.num_hidden_layers)]
        layers.append(nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps))
        if not config.tie_word_embeddings:
            layers.append(nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias))
        self.layers = nn.ModuleList(layers)
        self._rotary: tuple[Tensor, Tensor] | None = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ShortConv):
            module.reset_parameters()
        for name, parameter in module.named_parameters(recurse=False):
            if name == "beta":
                nn.init.zeros_(parameter)

    def get_input_embeddings(self) -> nn.Module:
        return self.layers[0]

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.layers[0] = value

    def get_output_embeddings(self) -> nn.Module | None:
        return None if self.config.tie_word_embeddings else self.layers[-1]

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        if self.config.tie_word_embeddings:
            raise ValueError("there is no output embedding: tie_word_embeddings is true")
        self.layers[-1] = new_embeddings

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the model makes an InfiniCache itself

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: InfiniCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
        **kwargs,
    ):
        """Reads tokens [b, any length] after those in the cache, at most one segment at a time.

        Args:
            attention_mask: all ones, because all rows of a batch have the same length.
            past_key_values: the cache that an earlier call returned.
            inputs_embeds: [b, any length, hidden_size], in place of input_ids.
            labels: shaped like input_ids, with -100 where there is no loss.
            use_cache: whether to return the cache; by default only outside of training.
            logits_to_keep: number of last tokens, or indices of tokens, that get logits; 0: all.
            output_hidden_states: whether to return the input of each block and the output of the
                final norm, for all tokens.
            output_attentions: must be false, since there is no matrix of attention weights.
            num_items_in_batch: divisor of the sum of the tokens' losses; by default the number of
                labels given.
            shift_labels: what each token's logits should predict, in place of labels.
            kwargs: position_ids or cache_position, if they match the tokens' places.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        config = self.config
        if config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError("output_attentions must be false: reading the memory yields none")
        if output_hidden_states is None:
            output_hidden_states = bool(config.output_hidden_states)
        if output_hidden_states and inputs_embeds is None:
            inputs_embeds = self.layers[0](input_ids)
        given: Tensor = inputs_embeds if inputs_embeds is not None else input_ids  # type: ignore
        cache = self._opened(past_key_values, given)
        _check_mask(attention_mask)
        _check_positions(kwargs, cache.tokens, given.shape[1])
        losses = labels is not None or shift_labels is not None
        if losses and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("logits_to_keep must be 0 where there are labels: all logits count")
        some = isinstance(logits_to_keep, int) and logits_to_keep > 0
        hidden, states = self._read_all(
            given, cache, int(logits_to_keep) if some else 0, output_hidden_states
        )
        if not isinstance(logits_to_keep, int):
            hidden = hidden[:, logits_to_keep]
        logits, loss = self._head(hidden), None
        if losses:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=logits.shape[-1],
                num_items_in_batch=num_items_in_batch, shift_labels=shift_labels,
            )  # fmt: skip
        keep = (config.use_cache and not self.training) if use_cache is None else use_cache
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=cache if keep else None,  # type: ignore[arg-type]
            hidden_states=states,
        )
        with_names = config.return_dict if return_dict is None else return_dict
        return output if with_names else output.to_tuple()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: InfiniCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs,
    ) -> dict[str, Any]:
        name, given = "input_ids", input_ids
        if inputs_embeds is not None and is_first_iteration:
            name, given = "inputs_embeds", inputs_embeds
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        if seen:
            if kwargs.get("use_cache") is False:  # each call would get all tokens
                raise ValueError("use_cache must be true to go on with past_key_values")
            # Number of tokens not read yet; None means all. Older releases of transformers 5 pass
            # their positions instead.
            new = kwargs.get("next_sequence_length")
            if "cache_position" in kwargs:
                new = len(kwargs["cache_position"])
            if new is not None and new < 1:
                raise ValueError(
                    f"{name} has {given.shape[1]} tokens, the cache has read {seen}: give the "
                    "whole text, at least one token longer"
                )
            given = given if new is None else given[:, -new:]
        positions = kwargs.get("position_ids")
        if positions is not None:
            kwargs["position_ids"] = positions[..., -given.shape[1] :]
        kwargs.setdefault("logits_to_keep", 1)
        return {
            name: given.to(self.device),
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            **{key: kwargs[key] for key in kwargs if key in _ASKED},
        }

    def init_continuous_batching(self, *args, **kwargs):
        raise NotImplementedError("there is no continuous batching: it needs a paged cache")

    def _opened(self, cache: InfiniCache | None, given: Tensor) -> InfiniCache:
        """Returns the cache to continue with, a new one if none is given.

        Raises:
            ValueError: the cache belongs to another class, model or batch, or there is no token.
        """
        if given.ndim < 2 or not given.shape[1]:
            raise ValueError(
                f"there must be at least one token in [batch, tokens], got {[*given.shape]}"
            )
        if cache is None:
            cache = InfiniCache()
        if not isinstance(cache, InfiniCache):
            raise ValueError(
                f"past_key_values ({type(cache).__name__}) must be an InfiniCache, which this "
                "model returns"
            )
        if not cache.layers:
            cache.layers = [LayerState() for _ in range(self.config.num_hidden_layers)]
            cache.rows = len(given)
        if len(cache.layers) != self.config.num_hidden_layers:
            raise ValueError(
                f"past_key_values has {len(cache.layers)} layers: it is another model's"
            )
        if cache.rows != len(given):
            raise ValueError(
                f"past_key_values holds {cache.rows} texts, the batch {len(given)}: make as many "
                "with its batch_repeat_interleave"
            )
        return cache

    def _read_all(
        self, given: Tensor, cache: InfiniCache, keep: int, inner: bool
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Returns final hidden states and, if wanted, each block's input and the final output.

        Args:
            given: token ids [b, t], or embeddings [b, t, hidden_size].
            keep: number of last tokens whose final hidden states are returned; 0 means all.
        """
        n, length = self.config.segment_length, given.shape[1]
        wanted_from = length - keep if keep else 0
        kept, states, begin = [], [], 0
        while begin < length:
            end = min(length, begin + n - cache.tokens % n)
            piece = given[:, begin:end]
            hidden = piece if given.ndim == 3 else self.layers[0](piece)
            into = self._read(hidden, cache)
            if end > wanted_from:
                kept.append(into[-1][:, max(wanted_from - begin, 0) :])
            if inner:
                states.append(into)
            begin = end
        final = torch.cat(kept, dim=1)
        if not inner:
            return final, None
        _, *between, last = (torch.cat(parts, dim=1) for parts in zip(*states))  # noqa: B905
        return final, (given, *between, last if keep else final)

    def _read(self, hidden: Tensor, cache: InfiniCache) -> list[Tensor]:
        """Returns each block's input and the final norm's output for a part of the open segment.

        The cache is updated only after all layers have run.
        """
        into, after = [], []
        cos, sin = self._rotary_table(hidden.device)
        for layer, state in zip(self.layers[1:], cache.layers):  # noqa: B905, norm and head follow
            into.append(hidden)
            hidden, *fields = layer(hidden, cos, sin, *vars(state).values())
            after.append(LayerState(*fields))
        cache.layers, cache.tokens = after, cache.tokens + hidden.shape[1]
        return [*into, self.layers[1 + self.config.num_hidden_layers](hidden)]

    def _head(self, hidden: Tensor) -> Tensor:
        if self.config.tie_word_embeddings:
            weight: Tensor = self.layers[0].weight  # type: ignore[assignment]
            return F.linear(hidden.to(weight.device), weight)  # it may be on another device
        return self.layers[-1](hidden)

    def _rotary_table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns cos and sin for the positions in a segment, and in a sliding window behind the
        segment before it, [n or 2 n, d / 2]; each segment restarts."""
        if self._rotary is None or self._rotary[0].device != device:
            config = self.config
            exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
            frequencies = config.rotary_base**-exponents
            if config.rotary_scaling:
                frequencies = _scaled(frequencies, config.rotary_scaling)
            seen = config.segment_length * (2 if config.use_sliding_window else 1)
            positions = torch.arange(seen, dtype=torch.float64)
            angles = positions[:, None] * frequencies
            with torch.inference_mode(False):  # training may use the table later
                angles = angles.clone()
                self._rotary = angles.cos().float().to(device), angles.sin().float().to(device)
        return self._rotary


def _check_mask(mask: Tensor | None) -> None:
    if mask is not None and not (mask.ndim == 2 and bool((mask == 1).all())):
        raise ValueError(
            "attention_mask must be all ones: padding would be read as text; put texts of one "
            "length into a batch"
        )


def _check_positions(given: dict[str, Any], seen: int, length: int) -> None:
    for name, positions in given.items():
        if name not in ("position_ids", "cache_position"):
            raise TypeError(f"{name} is not supported: this model does not know it")
        if positions is not None:
            expected = torch.arange(seen, seen + length, device=positions.device)
            if positions.shape[-1] != length or not bool((positions == expected).all()):
                raise ValueError(
                    f"{name} must go on from {seen}, one per token: each row is one whole text"
                )


def _scaled(frequencies: Tensor, scaling: dict) -> Tensor:
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    # Llama 3.1 divides low frequencies by the factor, keeps high ones, and blends between them.
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling["factor"]
