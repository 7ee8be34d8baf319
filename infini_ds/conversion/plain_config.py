"""Validates what is read from a plain model's config.json: types, ranges and defaults."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from infini_ds.errors import UserError

# The limits are far above all existing models, and below anything that overflows.
_Tokens = Annotated[int, Field(ge=1, le=1 << 31)]
_Width = Annotated[int, Field(ge=1, le=1 << 24)]
_Count = Annotated[int, Field(ge=1, le=1 << 12)]
_Positive = Annotated[float, Field(gt=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")


class PlainConfig(_Strict):
    """Settings by their names in config.json; those that checkpoints may omit have a default."""

    model_type: str
    vocab_size: _Tokens
    hidden_size: _Width
    intermediate_size: _Width
    num_hidden_layers: _Count
    num_attention_heads: _Count
    num_key_value_heads: _Count | None = None
    head_dim: _Count | None = None
    rms_norm_eps: _Positive
    hidden_act: Literal["silu", "gelu"] = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: Annotated[float, Field(ge=0)] = 0.02
    max_position_embeddings: _Tokens | None = None
    use_sliding_window: bool | None = None
    sliding_window: _Tokens | None = 4096
    rope_theta: _Positive = 10000.0
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None


class Rope(_Strict):
    """Rotary frequencies without scaling."""

    rope_theta: _Positive


class Linear(Rope):
    """Linear scaling, whose settings have no default."""

    factor: _Positive


class Llama3(Linear):
    """The scaling of Llama 3.1."""

    low_freq_factor: _Positive
    high_freq_factor: _Positive
    original_max_position_embeddings: _Tokens

    @model_validator(mode="after")
    def _check(self) -> "Llama3":
        low, high = self.low_freq_factor, self.high_freq_factor
        if low >= high:
            raise ValueError(f"low_freq_factor ({low}) must be below high_freq_factor ({high})")
        return self


_Kind = TypeVar("_Kind", bound=BaseModel)


def checked(kind: type[_Kind], tree: dict[str, Any], origin: str) -> _Kind:
    """Validates a tree of settings as one of the kinds above.

    Args:
        origin: prefix for the name of a setting, for messages.

    Raises:
        UserError: a setting is wrong; names the first.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{origin}{explain(error)}") from None


def explain(error: ValidationError) -> str:
    """Describes the first error in one line that names the setting."""
    first = error.errors()[0]
    if first["type"] == "value_error":
        return str(first.get("ctx", {})["error"])
    name = first["loc"][0]
    if first["type"] == "missing":
        return f"{name} is missing"
    return f"{name}: {first['msg'].lower()}, got {first['input']!r}"
