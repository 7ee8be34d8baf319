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
from .layers_infini import InfiniBlock, LayerState, Piece, ShortConv, TokenEmbedding

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
    tokens: int = 0  # number given so far, padding included
    read: list[int] = field(default_factory=list)  # tokens that each text has, without padding
    is_compileable = False
    is_croppable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for layer in self.layers:
            layer.select(beam_idx)
        self.read = [self.read[row] for row in beam_idx.tolist()]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(len(self.read)).repeat_interleave(repeats))

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
        layers: list[nn.Module] = [TokenEmbedding(config.vocab_size, config.hidden_size)]
        layers += [InfiniBlock(config, layer) for layer in range(config.num_hidden_layers)]
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
            attention_mask: 1 for text and 0 for padding, which may stand anywhere and is not read,
                [b, tokens], of these tokens or of those in the cache as well. The logits of padding
                are those of the last token before it.
            past_key_values: the cache that an earlier call returned.
            inputs_embeds: [b, any length, hidden_size], in place of input_ids.
            labels: shaped like input_ids, with -100 where there is no loss, as at padding.
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
        text = _text(attention_mask, given, cache.tokens)
        _check_positions(kwargs, cache, given, text)
        losses = labels is not None or shift_labels is not None
        if losses and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("logits_to_keep must be 0 where there are labels: all logits count")
        some = isinstance(logits_to_keep, int) and logits_to_keep > 0
        hidden, states = self._read_all(
            given, text, cache, int(logits_to_keep) if some else 0, output_hidden_states
        )
        if not isinstance(logits_to_keep, int):
            hidden = hidden[:, logits_to_keep]
        logits, loss = self._head(hidden), None
        if losses:
            if labels is not None and text is not None:
                labels = labels.masked_fill(text.cumsum(dim=1) < 2, -100)  # nothing before it
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
            cache.read = [0] * len(given)
        if len(cache.layers) != self.config.num_hidden_layers:
            raise ValueError(
                f"past_key_values has {len(cache.layers)} layers: it is another model's"
            )
        if len(cache.read) != len(given):
            raise ValueError(
                f"past_key_values holds {len(cache.read)} texts, the batch {len(given)}: make as "
                "many with its batch_repeat_interleave"
            )
        return cache

    def _read_all(
        self, given: Tensor, text: Tensor | None, cache: InfiniCache, keep: int, inner: bool
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Returns final hidden states and, if wanted, each block's input and the final output.

        Args:
            given: token ids [b, t], or embeddings [b, t, hidden_size].
            text: which of them are not padding, bool [b, t]; None means all.
            keep: number of last tokens whose final hidden states are returned; 0 means all.
        """
        if text is not None or len(set(cache.read)) > 1:
            final, states = self._read_rows(given, text, cache, inner)
        else:
            final, states = self._read_even(given, cache, keep, inner)
        cache.tokens += given.shape[1]
        if not inner:
            return final[:, -keep:], None
        _, *between, last = states
        return final[:, -keep:], (given, *between, last)

    def _read_even(
        self, given: Tensor, cache: InfiniCache, keep: int, inner: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Reads texts of which all have equally many tokens, without padding."""
        n, length = self.config.segment_length, given.shape[1]
        wanted_from = length - keep if keep else 0
        kept, states, begin = [], [], 0
        while begin < length:
            end = min(length, begin + n - cache.read[0] % n)
            into = self._read(given[:, begin:end], [end - begin] * len(given), cache)
            if end > wanted_from:
                kept.append(into[-1][:, max(wanted_from - begin, 0) :])
            if inner:
                states.append(into)
            begin = end
        whole = [torch.cat(parts, dim=1) for parts in zip(*states)]  # noqa: B905
        return torch.cat(kept, dim=1), whole

    def _read_rows(
        self, given: Tensor, text: Tensor | None, cache: InfiniCache, inner: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Reads texts of any lengths, each from its own place in its own segment."""
        if text is None:
            text = torch.ones(given.shape[:2], dtype=torch.bool, device=given.device)
        n, lengths = self.config.segment_length, text.sum(dim=1).tolist()
        order = text.long().argsort(dim=1, descending=True, stable=True)  # text before padding
        done, parts, places = [0] * len(given), [], []
        while any(begin < length for begin, length in zip(done, lengths)):  # noqa: B905
            counts = [
                min(length - begin, n - read % n)
                for begin, length, read in zip(done, lengths, cache.read)  # noqa: B905
            ]
            row = torch.arange(max(counts), device=given.device)
            begin = torch.tensor(done, device=given.device)[:, None]
            index = order.gather(1, (begin + row).clamp(max=order.shape[1] - 1))
            if given.ndim == 3:
                index = index[..., None].expand(-1, -1, given.shape[2])
            into = self._read(given.gather(1, index), counts, cache)
            parts.append(into if inner else into[-1:])
            # What is padding goes behind the end.
            end = torch.tensor(counts, device=given.device)[:, None]
            places.append((begin + row).where(row < end, max(lengths)))
            done = [begin + count for begin, count in zip(done, counts)]  # noqa: B905
        # Each token takes what came of it, and padding what came of the last token before it.
        source = (text.long().cumsum(dim=1) - 1).clamp(min=0)
        whole = [_spread(pieces, places, source) for pieces in zip(*parts)]  # noqa: B905
        return whole[-1], whole

    def _read(self, given: Tensor, counts: list[int], cache: InfiniCache) -> list[Tensor]:
        """Returns each block's input and the final norm's output for parts of open segments.

        The cache is updated only after all layers have run.

        Args:
            given: token ids or embeddings, [b, most of the counts, ...].
            counts: number of them that each row has; padding follows.
        """
        hidden = given if given.ndim == 3 else self.layers[0](given)
        n = self.config.segment_length
        used, begun = [read % n for read in cache.read], [read >= n for read in cache.read]
        piece, into, after = Piece(used, counts, begun), [], []
        cos, sin = self._rotary_table(hidden.device)
        for layer, state in zip(self.layers[1:], cache.layers):  # noqa: B905, norm and head follow
            into.append(hidden)
            hidden, *fields = layer(hidden, cos, sin, piece, *vars(state).values())
            after.append(LayerState(*fields))
        cache.layers = after
        cache.read = [read + count for read, count in zip(cache.read, counts)]  # noqa: B905
        return [*into, self.layers[1 + self.config.num_hidden_layers](hidden)]

    def _head(self, hidden: Tensor) -> Tensor:
        if self.config.tie_word_embeddings:
            embedding = self.layers[0]
            if isinstance(embedding, TokenEmbedding):  # its call brings both to one device
                return embedding(hidden, as_head=True)
            weight: Tensor = embedding.weight  # type: ignore[assignment]
            return F.linear(hidden.to(weight.device), weight)
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


def _spread(parts: tuple[Tensor, ...], places: list[Tensor], source: Tensor) -> Tensor:
    """Puts parts of rows together, [b, t, hidden_size].

    Args:
        parts: [b, tokens, hidden_size] each.
        places: of their tokens among those of the row, [b, tokens] each; the largest is for none.
        source: which token of the row each place of the result takes, [b, t].
    """
    place, size = torch.cat(places, dim=1), parts[0].shape[-1]
    room = parts[0].new_zeros(len(source), source.shape[1] + 1, size)
    room = room.scatter(1, place[..., None].expand(-1, -1, size), torch.cat(parts, dim=1))
    return room.gather(1, source[..., None].expand(-1, -1, size))


def _text(mask: Tensor | None, given: Tensor, seen: int) -> Tensor | None:
    """Returns which of the given tokens are not padding, bool [b, t], or None if all are.

    Args:
        mask: of the given tokens, or of `seen` tokens before them as well.
    """
    rows, t = given.shape[:2]
    if mask is None:
        return None
    if mask.ndim != 2 or len(mask) != rows or mask.shape[1] not in (t, seen + t):
        raise ValueError(
            f"attention_mask {[*mask.shape]} must be [{rows}, {t}], or [{rows}, {seen + t}] with "
            "the tokens in the cache: 1 for text, 0 for padding"
        )
    mask = mask[:, -t:].to(given.device)
    text = mask == 1
    if not bool((text | (mask == 0)).all()):
        raise ValueError("attention_mask must have 1 for text and 0 for padding")
    if not bool(text.any()):
        raise ValueError("attention_mask must leave at least one token that is not padding")
    return None if bool(text.all()) else text


def _check_positions(
    options: dict[str, Any], cache: InfiniCache, given: Tensor, text: Tensor | None
) -> None:
    rows, t = given.shape[:2]
    if text is None:
        text = torch.ones(rows, t, dtype=torch.bool)
    for name, positions in options.items():
        if name not in ("position_ids", "cache_position"):
            raise TypeError(f"{name} is not supported: this model does not know it")
        if positions is None:
            continue
        # Places in the cache count padding, positions in a text do not.
        counted = text if name == "position_ids" else torch.ones_like(text)
        seen = cache.read if name == "position_ids" else [cache.tokens] * rows
        expected = torch.tensor(seen)[:, None] + counted.cumsum(dim=1).cpu() - 1
        right = (positions.cpu() == expected) | ~counted.cpu() if positions.shape[-1] == t else None
        if right is not None and bool(right.all()):
            continue
        begin = ", ".join(map(str, dict.fromkeys(cache.read)))
        raise ValueError(
            f"{name} must go on from {begin}, one per token: each row is one whole text"
        )


def _scaled(frequencies: Tensor, scaling: dict) -> Tensor:
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    # Llama 3.1 divides low frequencies by the factor, keeps high ones, and blends between them.
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling["factor"]
