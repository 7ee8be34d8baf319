"""The one typed tree of settings: YAML files, dotted overrides, clear errors.

Every field has a docstring; the README's configuration reference is generated from them
(`infini-ds config`). A module receives its own subtree, never the whole tree. This file imports
neither torch nor DeepSpeed, so that a mistake is reported at once.
"""

import difflib
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from infini_ds.config.read_yaml import read_value, read_yaml, write_yaml
from infini_ds.errors import UserError
from infini_ds.system.paths import argument, as_path

_LARGEST = 2**31 - 1
"""Of all integers: what counts tokens, steps or bytes with more than these is a slip."""
_WEEK = 7 * 24 * 3600
_RESOLVED = "resolved"


def _as_typed(text: str, info: ValidationInfo) -> str:
    return text if info.context == _RESOLVED else as_path(text)


_PathText = Annotated[str, AfterValidator(_as_typed)]
"""A path, or empty. What decides what is in a store, such as data.files, stays as it is typed."""
_SPOKEN = {"yes": True, "on": True, "no": False, "off": False}
LARGEST_GATE = 10000.0
"""Of the gates' beta, whose sigmoid is 0 or 1 long before; every type of weights can hold it."""


class Settings(BaseModel):
    """Base of every section: keyword only, immutable, no unknown keys, no numbers without end, no
    silent conversions but of what YAML reads as another type than is plainly meant."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    @model_validator(mode="before")
    @classmethod
    def _read(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        fields = cls.model_fields
        return {
            name: _as_meant(fields[name].annotation, value) if name in fields else value
            for name, value in tree.items()
        }

    @model_validator(mode="after")
    def _check_integers(self) -> "Settings":
        for name in type(self).model_fields:
            value = getattr(self, name)
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int):
                    small = abs(number) <= _LARGEST
                    _require(self, name, small, f"from -{_LARGEST} to {_LARGEST}")
        return self


def _as_meant(kind: Any, value: Any) -> Any:
    """Nothing for a string or a section, `yes` for true, 1e6 for an integer, one string for a list
    of them."""
    whole = typing.get_origin(kind) or kind
    if value is None and isinstance(whole, type) and issubclass(whole, (str, Settings, dict)):
        return "" if whole is str else {}
    if kind is bool and isinstance(value, str):
        return _SPOKEN.get(value.lower(), value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value) if abs(value) < 2**53 else value
    if kind == list[str] and isinstance(value, str):
        return [value]
    return value


def _require(section: Settings, name: str, good: bool, what: str) -> None:
    if not good:
        raise ValueError(f"{name} ({getattr(section, name)}) must be {what}")


def _require_at_least(section: Settings, name: str, least: int) -> None:
    _require(section, name, getattr(section, name) >= least, f"at least {least}")


def _require_above_0(section: Settings, *names: str) -> None:
    for name in names:
        _require(section, name, getattr(section, name) > 0, "above 0")


def _require_epsilon(section: Settings, name: str) -> None:
    """A smaller one would be 0 in fp32, and 0 / 0 is not a number."""
    _require(section, name, 1e-30 <= getattr(section, name) <= 1, "from 1e-30 to 1")


def _require_lengths(section: "PasskeyConfig | CurriculumConfig", least: int) -> None:
    lengths = section.segments
    if not lengths or lengths[0] < least or lengths != sorted(set(lengths)):
        raise ValueError(f"segments ({lengths}) must be growing numbers of at least {least}")


class RopeScaling(Settings):
    """How rotary frequencies are changed for models pretrained with scaled positions."""

    rope_type: Literal["linear", "llama3"] = "linear"
    """`linear` divides all frequencies by `factor`; `llama3` only the low ones (Llama 3.1)."""
    factor: float = 1.0
    """By how much the (low) frequencies are divided."""
    low_freq_factor: float = 1.0
    """`llama3`: wavelengths above original_max_position_embeddings / this are fully scaled."""
    high_freq_factor: float = 4.0
    """`llama3`: wavelengths below original_max_position_embeddings / this are left alone."""
    original_max_position_embeddings: int = 8192
    """`llama3`: the context length of the model before scaling."""

    @model_validator(mode="after")
    def _check(self) -> "RopeScaling":
        _require_above_0(self, "factor", "low_freq_factor", "original_max_position_embeddings")
        _require(
            self, "high_freq_factor", self.high_freq_factor > self.low_freq_factor,
            f"above low_freq_factor ({self.low_freq_factor})",
        )  # fmt: skip
        return self


class MemoryConfig(Settings):
    """What the model learns about writing into its memories, beyond the paper."""

    write_gate: bool = False
    """Each token decides how much of it is written into the memory of each key-value head."""
    write_penalty: float = 0.0
    """Added to the loss: this x the sum over layers of the mean write weight (with write_gate)."""
    short_conv: bool = False
    """Queries, keys and values see the 4 tokens before them: a causal convolution, 0 at start."""

    @model_validator(mode="after")
    def _check(self) -> "MemoryConfig":
        _require_at_least(self, "write_penalty", 0)
        if self.write_penalty and not self.write_gate:
            raise ValueError(
                f"write_penalty ({self.write_penalty}) must be 0 when write_gate is false"
            )
        return self


class ModelConfig(Settings):
    """The Infini-Transformer itself; names are Hugging Face's where one exists."""

    vocab_size: int = 0
    """Number of token ids. 0 in a run's config: taken from the token store."""
    hidden_size: int
    """Width of the residual stream."""
    num_layers: int
    """Number of Transformer blocks."""
    num_heads: int
    """Query heads per layer."""
    num_kv_heads: int = 0
    """Key-value heads per layer, each with one compressive memory; 0 means `num_heads`."""
    head_dim: int = 128
    """Width of a head. Wide heads hold more memory: it has head_dim x head_dim numbers a head."""
    intermediate_size: int = 0
    """Width of the gated feed-forward; 0 means 8/3 of hidden_size, rounded up to 64."""
    segment_length: int = 2048
    """Tokens of one segment (n): local attention stays inside it, the memory spans all of them."""
    memory_rule: Literal["linear", "delta"] = "linear"
    """How a segment is written into the memory: eq. (4) of the paper, or the delta rule (5)."""
    memory: MemoryConfig = MemoryConfig()
    """What the model learns about writing into its memories, beyond the paper."""
    hidden_act: Literal["silu", "gelu"] = "silu"
    """Gate of the feed-forward: `silu` is SwiGLU, `gelu` is GEGLU."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies; positions restart at 0 in each segment."""
    rope_scaling: RopeScaling | None = None
    """Scaling of the rotary frequencies, as a pretrained model may ask for."""
    norm_eps: float = 1e-5
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
    gate_init: float = 0.0
    """Initial beta of the gates: the memory's share of a head's output is sigmoid(beta)."""
    initializer_range: float = 0.02
    """Standard deviation of initial weights; those that end a branch are divided by sqrt(2 L)."""

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
        for name in ("hidden_size", "num_layers", "num_heads", "head_dim", "segment_length"):
            _require(self, name, 1 <= getattr(self, name) <= 2**20, f"from 1 to {2**20}")
        for name in ("vocab_size", "num_kv_heads", "intermediate_size"):
            _require_at_least(self, name, 0)
        _require_at_least(self, "rope_theta", 1)
        _require(self, "initializer_range", 0 <= self.initializer_range <= 100, "from 0 to 100")
        _require(
            self, "gate_init", abs(self.gate_init) <= LARGEST_GATE,
            f"from -{LARGEST_GATE:g} to {LARGEST_GATE:g}",
        )  # fmt: skip
        _require_epsilon(self, "norm_eps")
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.kv_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even, for rotary positions")
        if self.tie_embeddings and self.head_bias:
            raise ValueError("head_bias must be false when tie_embeddings is true")
        return self


TOKENIZER_FILES = {"bytes": "", "sentencepiece": "tokenizer.model", "tokenizers": "tokenizer.json"}
"""Names of a tokenizer's file in stores and exports, by its kind."""


class TokenizerConfig(Settings):
    """What turns text into token ids."""

    kind: Literal["sentencepiece", "tokenizers", "bytes"] = "sentencepiece"
    """A `sentencepiece` model, a tokenizer.json of `tokenizers`, or `bytes` (256, BOS, EOS)."""
    model: _PathText = ""
    """File of the tokenizer; empty: train a sentencepiece model on the corpus while preparing."""
    vocab_size: int = 4096
    """Size of the vocabulary to train (sentencepiece without `model`)."""
    training_bytes: int = 20_000_000
    """At most this much text is used to train the tokenizer, spread over the corpus."""
    min_restored: float = 0.9
    """Refuse a tokenizer where less of the text (share of bytes) comes back from its tokens."""

    @model_validator(mode="after")
    def _check(self) -> "TokenizerConfig":
        _require(self, "min_restored", 0 <= self.min_restored <= 1, "from 0 to 1")
        if self.kind == "bytes" and self.model:
            raise ValueError("model must be empty when kind is bytes")
        if self.kind == "tokenizers" and not self.model:
            raise ValueError("model must name a tokenizer.json when kind is tokenizers")
        large = 320 <= self.vocab_size <= 2**20
        _require(self, "vocab_size", large, f"from 320 (256 are bytes) to {2**20}")
        _require_at_least(self, "training_bytes", 1)
        return self


class PasskeyConfig(Settings):
    """Documents that hide a pass key in filler and ask for it in their last segment."""

    segment_length: int = 2048
    """Tokens of a segment, the same as model.segment_length: a document is whole segments."""
    segments: list[int] = [2, 4, 8, 16]
    """Lengths of the documents, in segments."""
    documents: int = 1000
    """Documents of each length."""
    digits: int = 5
    """Digits of a pass key."""
    keys: int = 1
    """Pass keys in a document; several have names, and one of them is asked for."""
    filler: Literal["standard", "noise", "text"] = "standard"
    """The sentences of Mohtashami & Jaggi (2023) over and over, random letters, or real text."""
    text_files: list[str] = []
    """`filler: text`: paths, globs as in data.files; empty: the sources of `python-stdlib`."""

    @model_validator(mode="after")
    def _check(self) -> "PasskeyConfig":
        for name in ("segment_length", "documents", "digits", "keys"):
            _require_at_least(self, name, 1)
        short = self.digits < self.segment_length
        _require(self, "digits", short, f"below segment_length ({self.segment_length})")
        _require_lengths(self, least=2)
        return self


class CorpusConfig(Settings):
    """Where documents come from, and the token store made of them."""

    source: Literal["python-stdlib", "files", "huggingface", "passkey"] = "python-stdlib"
    """The running Python's own library sources, local files, a hub dataset, or made pass keys."""
    files: list[str] = []
    """`files`: paths, globs: .txt (a document each), .jsonl, .json, .parquet; also .gz or .zst."""
    document_separator: str = ""
    """`files`: a new document begins wherever a .txt has this; empty: one .txt, one document."""
    dataset: str = ""
    """`huggingface`: dataset name or local directory."""
    dataset_config: str = ""
    """`huggingface`: configuration name, if the dataset has several."""
    dataset_split: str = "train"
    """`huggingface`: which split to read."""
    streaming: bool = True
    """`huggingface`: read as a stream instead of downloading everything first."""
    text_field: str = "text"
    """Field with a document's text in records of .jsonl, .parquet or datasets; also `meta.text`."""
    weighted_field: str = ""
    """Instead of text_field: a list of [text, weight] or {text, weight}, weights of the loss."""
    max_documents: int = 0
    """Stop after this many documents; 0 means all."""
    held_out_fraction: float = 0.02
    """Share of documents kept for evaluation, chosen by a hash of their text so it never moves."""
    store: _PathText = ""
    """Directory of the token store that `infini-ds prepare` writes; must be given."""
    passkey: PasskeyConfig = PasskeyConfig()
    """`passkey`: the documents that are made."""

    @property
    def weighted(self) -> bool:
        """Whether the store has a weight for each token."""
        return self.source == "passkey" or self.weighted_field != ""

    @model_validator(mode="after")
    def _check_corpus(self) -> "CorpusConfig":
        if self.source == "files" and not self.files:
            raise ValueError("files must name at least one path or glob when source is files")
        if self.source == "huggingface" and not self.dataset:
            raise ValueError("dataset must be named when source is huggingface")
        if self.weighted_field and self.source not in ("files", "huggingface"):
            raise ValueError("weighted_field must be empty unless source is files or huggingface")
        _require(self, "held_out_fraction", 0 <= self.held_out_fraction < 1, "in [0, 1)")
        _require_at_least(self, "max_documents", 0)
        return self


class MixtureCorpus(CorpusConfig):
    """A corpus of a mixture, under a name; also all settings of `data` above, store included."""

    weight: float = 1.0
    """Its share of the tokens that are trained on, relative to the other corpora's weights."""

    @model_validator(mode="after")
    def _check_weight(self) -> "MixtureCorpus":
        _require(self, "weight", 1e-6 <= self.weight <= 1e6, "from 1e-6 to 1e6")
        return self


class DataConfig(CorpusConfig):
    """Where documents come from, and the token store made of them."""

    tokenizer: TokenizerConfig = TokenizerConfig()
    """What turns text into token ids."""
    mixture: dict[str, MixtureCorpus] = {}
    """Instead of one corpus: several, by name, which share the tokenizer."""

    @property
    def corpora(self) -> dict[str, "DataConfig"]:
        """The corpora by name, in alphabetical order, each with the tokenizer; one without a
        mixture is named ""."""
        if not self.mixture:
            return {"": self}
        return {name: self._alone(self.mixture[name]) for name in sorted(self.mixture)}

    def _alone(self, corpus: MixtureCorpus) -> "DataConfig":
        settings = {name: getattr(corpus, name) for name in CorpusConfig.model_fields}
        return DataConfig(**settings, tokenizer=self.tokenizer)

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if not self.mixture:
            if "store" not in self.model_fields_set:
                raise ValueError("store must name the directory of the token store")
            if self.source == "passkey" and self.tokenizer.kind != "bytes":
                raise ValueError("tokenizer.kind must be bytes when source is passkey")
            return self
        for name, field in CorpusConfig.model_fields.items():
            if getattr(self, name) != field.default:
                raise ValueError(f"{name} must be given to each corpus of mixture, not beside it")
        if self.tokenizer.kind == "sentencepiece" and not self.tokenizer.model:
            raise ValueError(
                "tokenizer.model must name a model for the corpora of mixture to share; "
                "tokenizer/train.sh trains one"
            )
        stores: dict[str, str] = {}
        for name, corpus in self.mixture.items():
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ValueError(f"mixture: name {name!r} must be of letters, digits, - and _")
            try:
                self._alone(corpus)
            except ValidationError as error:
                raise ValueError(
                    f"mixture.{name}: {error.errors()[0].get('ctx', {})['error']}"
                ) from None
            other = stores.setdefault(corpus.store, name)
            if other != name or not corpus.store:
                raise ValueError(f"mixture.{name}.store must name a directory of its own")
        return self


class OptimizerConfig(Settings):
    """AdamW and its learning rate."""

    learning_rate: float = 3e-4
    """Peak learning rate."""
    min_learning_rate_ratio: float = 0.1
    """Learning rate at the end, as a share of the peak."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After warm-up: cosine to the end, or stable and then a linear decay (warmup-stable-decay)."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    decay_steps: int = 0
    """`wsd`: steps of the final decay; 0 means a fifth of train.steps."""
    weight_decay: float = 0.1
    """Decay of matrices; norms, biases, embeddings, gates and short convolutions have none."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Epsilon of AdamW."""
    gate_learning_rate_multiplier: float = 1.0
    """Learning rate of the memory gates (beta), relative to the rest."""
    gradient_clipping: float = 1.0
    """Largest norm of the whole gradient; 0 means no clipping."""

    @model_validator(mode="after")
    def _check(self) -> "OptimizerConfig":
        _require_above_0(self, "learning_rate")
        for name in (
            "warmup_steps",
            "decay_steps",
            "weight_decay",
            "gate_learning_rate_multiplier",
            "gradient_clipping",
        ):
            _require_at_least(self, name, 0)
        for name in ("beta1", "beta2"):
            _require(self, name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        ratio = self.min_learning_rate_ratio
        _require(self, "min_learning_rate_ratio", 0 <= ratio <= 1, "in [0, 1]")
        _require_epsilon(self, "eps")
        return self


class CurriculumConfig(Settings):
    """Documents of growing lengths, the next one when the answers to this one are right."""

    segments: list[int] = [2, 4, 8, 16]
    """Lengths of the documents, in segments, one after another; each divides the window."""
    advance_at: float = 0.9
    """Share of answers that must be right, over `window` steps, before the next length begins."""
    window: int = 20
    """Steps at a length over which the share of right answers is taken."""
    review: float = 0.5
    """Share of the steps that read documents of the earlier lengths, in turn."""

    @model_validator(mode="after")
    def _check(self) -> "CurriculumConfig":
        _require_lengths(self, least=1)
        _require_at_least(self, "window", 1)
        _require(self, "advance_at", 0 < self.advance_at <= 1, "above 0 and at most 1")
        _require(self, "review", 0 <= self.review < 1, "in [0, 1)")
        return self


class TrainConfig(Settings):
    """One run: how much is read in a step, for how long, and what is kept."""

    steps: int
    """Optimizer steps of the whole run."""
    batch_size: int
    """Lanes in the global batch: each contributes one window to a step."""
    micro_batch_size: int = 1
    """Lanes that go through the pipeline together on one data-parallel rank."""
    window_segments: int = 1
    """Segments of a window (K): how far gradients flow back through the memory."""
    chunks: int = 1
    """Parts into which a window is cut on its way through the pipeline: shorter bubbles."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute type; `auto`: bf16 where it is the faster one. Memories and sums are fp32 always."""
    activation_checkpointing: Literal["none", "attention", "block"] = "none"
    """What is computed again in the backward pass instead of being kept."""
    loss_chunk_tokens: int = 0
    """Tokens whose logits exist at one time in the loss; 0: 1024 on a CPU, 2^28 logits on a GPU."""
    save_every: int = 500
    """Steps between checkpoints; one is always written at the end."""
    keep_last: int = 3
    """Checkpoints kept; older ones are deleted once a newer one is valid."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl and TensorBoard scalars."""
    on_bad_step: Literal["skip", "stop", "rollback"] = "skip"
    """Corrupt tokens, loss or gradient not finite: no update, an error, or back to a checkpoint."""
    max_skipped_steps: int = 10
    """Consecutive bad steps, or rollbacks to the same checkpoint, before the run stops."""
    timeout: float = 600.0
    """Seconds that any process waits for another before it gives up and says for what."""
    hang_timeout: float | None = None
    """Seconds in which a process must get something done or ends; by default half of timeout."""
    threads: int = 0
    """CPU threads a process; 0 means the machine's cores divided among its local processes."""
    curriculum: CurriculumConfig | None = None
    """Documents of growing lengths; by default all documents are read in one random order."""

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        for name in (
            "steps",
            "batch_size",
            "micro_batch_size",
            "window_segments",
            "chunks",
            "save_every",
            "keep_last",
            "log_every",
            "max_skipped_steps",
        ):
            _require_at_least(self, name, 1)
        _require_at_least(self, "loss_chunk_tokens", 0)
        _require(self, "threads", 0 <= self.threads <= 1024, "from 0 to 1024")
        if self.window_segments % self.chunks:
            raise ValueError(
                f"window_segments ({self.window_segments}) must be a multiple of chunks "
                f"({self.chunks})"
            )
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of micro_batch_size "
                f"({self.micro_batch_size})"
            )
        _require(
            self, "timeout", 0 < self.timeout <= _WEEK,
            f"above 0 seconds and at most {_WEEK} (a week)",
        )  # fmt: skip
        if self.hang_timeout is not None:
            good = 0 < self.hang_timeout < self.timeout
            _require(
                self, "hang_timeout", good, f"above 0 and below timeout ({self.timeout}) seconds"
            )
        for length in self.curriculum.segments if self.curriculum else []:
            if self.window_segments % length:
                raise ValueError(
                    f"window_segments ({self.window_segments}) must be a multiple of each of "
                    f"curriculum.segments, is not of {length}"
                )
        return self


class ParallelConfig(Settings):
    """How the work is laid out over processes. Losses do not depend on it."""

    pipeline_stages: int | Literal["auto"] = "auto"
    """Pipeline degree; `auto`: the largest that divides the processes and fits the layers."""
    memory_transport: Literal["carried", "resident"] = "carried"
    """Memories ride with the activations and return to the first stage, or stay at their stage."""
    zero_stage: Literal[0, 1] = 1
    """ZeRO: 1 shards the optimizer's states over the data-parallel ranks."""
    offload_optimizer: bool = False
    """Keep the optimizer's states in CPU memory (needs zero_stage 1)."""

    @model_validator(mode="after")
    def _check(self) -> "ParallelConfig":
        if self.pipeline_stages != "auto":
            _require_at_least(self, "pipeline_stages", 1)
        if self.offload_optimizer and self.zero_stage != 1:
            raise ValueError(f"zero_stage ({self.zero_stage}) must be 1 with offload_optimizer")
        return self

    def resolve_stages(self, world_size: int, num_layers: int) -> int:
        """Pipeline degree for this many processes.

        Raises:
            UserError: the degree does not divide the processes or exceeds the layers.
        """
        if self.pipeline_stages == "auto":
            return next(s for s in range(min(world_size, num_layers), 0, -1) if world_size % s == 0)
        if world_size % self.pipeline_stages:
            raise UserError(
                f"parallel.pipeline_stages ({self.pipeline_stages}) must divide the number of "
                f"processes ({world_size})"
            )
        if self.pipeline_stages > num_layers:
            raise UserError(
                f"parallel.pipeline_stages ({self.pipeline_stages}) must not exceed "
                f"model.num_layers ({num_layers})"
            )
        return self.pipeline_stages


class KernelsConfig(Settings):
    """What computes Infini-attention. The results are the same."""

    backend: Literal["auto", "torch", "triton"] = "auto"
    """Triton kernels (CUDA, bf16, head_dim 64 or 128), PyTorch's operators, or what fits."""


class EvaluationConfig(Settings):
    """Evaluation on held-out documents during the run and at its end."""

    every: int = 500
    """Steps between evaluations; one is always made at the end. 0: only at the end."""
    max_segments: int = 512
    """Held-out documents are read in order, whole, until this many segments; 0: all of them."""
    sample_tokens: int = 64
    """Length of the sample text generated at each evaluation; 0: none."""
    sample_prompt: str = ""
    """What the sample text starts from; empty: it is the beginning of a document."""

    @model_validator(mode="after")
    def _check(self) -> "EvaluationConfig":
        for name in ("every", "max_segments", "sample_tokens"):
            _require_at_least(self, name, 0)
        return self


class RunConfig(Settings):
    """A complete run."""

    output_dir: _PathText
    """Directory of the run: checkpoints, metrics.jsonl, TensorBoard events, resolved config."""
    seed: int = 0
    """Seed of the initial weights and of the order of documents."""
    resume: bool = True
    """Go on from the newest valid checkpoint in output_dir; false: refuse if there is one."""
    init_from: _PathText = ""
    """Export to start from, also with its `model` and `data.tokenizer`; empty: random weights."""
    model: ModelConfig
    """The Infini-Transformer itself."""
    data: DataConfig
    """Where documents come from."""
    train: TrainConfig
    """How much is read in a step, for how long, and what is kept."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and its learning rate."""
    parallel: ParallelConfig = ParallelConfig()
    """Layout over processes."""
    kernels: KernelsConfig = KernelsConfig()
    """What computes Infini-attention."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Evaluation on held-out documents."""

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        if not self.output_dir:
            raise ValueError("output_dir must name a directory")
        read = self.model.segment_length
        for corpus in self.data.corpora.values():
            made = corpus.passkey.segment_length
            if corpus.source == "passkey" and made != read:
                raise ValueError(
                    f"data.passkey.segment_length ({made}) must be model.segment_length ({read})"
                )
        if self.data.mixture and self.train.curriculum:
            raise ValueError("train.curriculum must be left out with data.mixture")
        return self

    def data_parallel_size(self, world_size: int) -> int:
        """Data-parallel degree for this many processes.

        Raises:
            UserError: the processes or the batch cannot be divided as the config asks.
        """
        stages = self.parallel.resolve_stages(world_size, self.model.num_layers)
        data = world_size // stages
        if self.train.batch_size % (data * self.train.micro_batch_size):
            raise UserError(
                f"train.batch_size ({self.train.batch_size}) must be a multiple of "
                f"train.micro_batch_size ({self.train.micro_batch_size}) x data-parallel size "
                f"({data})"
            )
        return data


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Reads a run's YAML file and applies overrides such as `train.steps=100`.

    Raises:
        UserError: the file is missing or not YAML, or a key or value is wrong; one line.
    """
    tree = _read(Path(path))
    for override in overrides:
        _apply(tree, override)
    if isinstance(tree.get("init_from"), str) and tree["init_from"]:
        _take_from_export(tree, Path(argument("init_from", tree["init_from"])))
    config = parse(tree, str(path))
    if not all(corpus.store for corpus in config.data.corpora.values()):  # only exports have none
        raise UserError(f"config {path}: data.store must name the directory of the token store")
    return config


def load_resolved(path: Path) -> RunConfig:
    """Reads what `dump` wrote, a run's own config.yaml: nothing that it names is looked at.

    Raises:
        UserError: the file is missing or not YAML, or a key or value is wrong; one line.
    """
    return parse(_read(path), str(path), _RESOLVED)


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = read_yaml(path.read_bytes())
    except OSError as error:
        raise UserError(f"config {path}: cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise UserError(f"config {path}: not valid YAML: {_one_line(error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"config {path}: must be a mapping of settings, is {type(tree).__name__}")
    return tree


def parse(tree: dict[str, Any], origin: str, context: str | None = None) -> RunConfig:
    """Validates a tree of settings; _RESOLVED as `context`: of a run, with paths as they are.

    Raises:
        UserError: the first thing that is wrong, in one line naming the setting and `origin`.
    """
    try:
        return RunConfig.model_validate(tree, context=context)
    except ValidationError as error:
        raise UserError(f"config {origin}: {_one_line(_explain(error))}") from None


def dump(config: RunConfig) -> str:
    """The resolved config as YAML: every setting, defaults included."""
    return write_yaml(config.model_dump())


def reference() -> str:
    """The configuration reference as Markdown, one table a section, from the field docstrings."""
    parts = []
    for prefix, section in _sections("", RunConfig):
        rows = ["| setting | type | default | meaning |", "|---|---|---|---|"]
        for name, field in section.model_fields.items():
            if _section_of(field.annotation) or not _is_told_here(section, name):
                continue
            default = "required" if field.is_required() else f"`{field.default!r}`"
            kind = _type_name(field.annotation).replace("|", "\\|")
            rows.append(f"| `{prefix}{name}` | {kind} | {default} | {field.description} |")
        title = prefix.rstrip(".") or "run"
        parts.append(f"**{title}**: {(section.__doc__ or '').strip()}\n\n" + "\n".join(rows))
    return "\n\n".join(parts) + "\n"


def _is_told_here(section: type[BaseModel], setting: str) -> bool:
    """Not of a corpus of a mixture, whose settings are those of `data` but one."""
    return section is not MixtureCorpus or setting not in CorpusConfig.model_fields


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: must look like key.path=value")
    node = tree
    *parents, leaf = key.split(".")
    for parent in parents:
        inner = {} if node.get(parent) is None else node[parent]
        if not isinstance(inner, dict):
            raise UserError(f"override {override!r}: {parent} is a value, not a section")
        node[parent] = node = dict(inner)  # one of its own: an alias gives two names to the same
    try:
        node[leaf] = read_value(text)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: {_one_line(error)}") from None


def _take_from_export(tree: dict[str, Any], export: Path) -> None:
    """What is not said of the model and its tokenizer is as in the export that a run starts from.

    A run that has begun needs its export no longer, if its config says all of that itself.
    """
    try:
        known = read_yaml((export / "config.yaml").read_bytes())
        model = known["model"]
    except OSError as error:
        if "model" in tree:
            return
        raise UserError(
            f"init_from ({export}): its config.yaml cannot be read ({error.strerror}); name a "
            "directory that `infini-ds convert` made, or give the settings of `model`"
        ) from None
    except (yaml.YAMLError, KeyError, TypeError):
        raise UserError(f"config {export / 'config.yaml'}: must be YAML with `model`") from None
    tree["model"] = _filled(tree.get("model") or {}, model)
    data = tree.get("data")
    if isinstance(data, dict) and "tokenizer" not in data and "tokenizer" in known:
        file = TOKENIZER_FILES.get(str(known["tokenizer"]))
        model_file = str(export / file) if file else ""
        data["tokenizer"] = {"kind": known["tokenizer"], "model": model_file}


def _filled(given: Any, missing: Any) -> Any:
    """A tree of settings with those that are missing in it."""
    if not isinstance(given, dict) or not isinstance(missing, dict):
        return given
    return {**missing, **{name: _filled(own, missing.get(name)) for name, own in given.items()}}


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    path = ".".join(location)
    if first["type"] == "extra_forbidden":
        section = _section_at(location[:-1])
        close = difflib.get_close_matches(location[-1], section.model_fields, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(section.model_fields)}"
        return f"unknown setting {path}; {hint}"
    if first["type"] == "missing":
        return f"{path} is required"
    if first["type"] == "value_error":
        return f"{path + ': ' if path else ''}{first.get('ctx', {})['error']}"
    return f"{path}: {first['msg'].lower()}, got {first['input']!r}"


def _section_at(location: list[str]) -> type[BaseModel]:
    section: type[BaseModel] = RunConfig
    for name in location:
        if name in section.model_fields:  # or it is the name of a corpus
            section = _section_of(section.model_fields[name].annotation) or section
    return section


def _section_of(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _sections(prefix: str, section: type[BaseModel]):
    yield prefix, section
    for name, field in section.model_fields.items():
        inner = _section_of(field.annotation)
        if inner and _is_told_here(section, name):
            named = "NAME." if inner is MixtureCorpus else ""
            yield from _sections(f"{prefix}{name}.{named}", inner)


def _type_name(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return " | ".join(f"`{value}`" for value in typing.get_args(annotation))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type_name(part) for part in typing.get_args(annotation))
    if origin is list:
        return f"list of {_type_name(typing.get_args(annotation)[0])}"
    return getattr(annotation, "__name__", str(annotation))


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
