"""Where documents come from: one corpus, or several of a mixture."""

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from infini_ds.config.settings import (
    RESOLVED,
    PathText,
    RangeText,
    Settings,
    require_growing,
)

TokenizerKind = Literal["sentencepiece", "tokenizers", "bytes"]
TOKENIZER_FILES = {"bytes": "", "sentencepiece": "tokenizer.model", "tokenizers": "tokenizer.json"}
"""Names of a tokenizer's file in stores and exports, by its kind."""
FillerKind = Literal["standard", "noise", "text"]
BabilongTask = Literal["qa1", "qa2", "qa3", "qa8"]
FEWEST_FACTS: dict[BabilongTask, int] = {"qa1": 1, "qa2": 2, "qa3": 3, "qa8": 1}
"""The facts that a question of each task needs at least."""
_CORPUS_NAME = "[A-Za-z0-9_-]+"


class TokenizerConfig(Settings):
    """The tokenizer, which turns text into token ids."""

    kind: TokenizerKind = "sentencepiece"
    """A `sentencepiece` model, a tokenizer.json of `tokenizers`, or `bytes` (256, BOS, EOS)."""
    model: PathText = ""
    """The tokenizer's file. If empty, a sentencepiece model is trained on the corpus first."""
    vocab_size: Annotated[
        int, Field(ge=320, le=2**20), RangeText(f"from 320 (256 are bytes) to {2**20}")
    ] = 4096
    """Size of the vocabulary to train (sentencepiece without `model`)."""
    training_bytes: int = Field(default=20_000_000, ge=1)
    """The tokenizer is trained on at most this much text, taken from all over the corpus."""
    min_restored: float = Field(default=0.9, ge=0, le=1)
    """Refuse a tokenizer if a smaller share of the text's bytes can be restored from its tokens."""
    chat_template: PathText = ""
    """File of the chat template, in Jinja. If empty, the one beside `model` is taken."""

    @model_validator(mode="after")
    def _check(self) -> "TokenizerConfig":
        if self.kind == "bytes" and self.model:
            raise ValueError("model must be empty when kind is bytes")
        if self.kind == "tokenizers" and not self.model:
            raise ValueError("model must name a tokenizer.json when kind is tokenizers")
        if self.kind == "sentencepiece" and self.chat_template and not self.model:
            raise ValueError("model must name a tokenizer.model when chat_template is given")
        return self


class PasskeyConfig(Settings):
    """Documents that hide a pass key in filler and ask for it in their last segment."""

    segment_length: int = Field(default=2048, ge=1)
    """Tokens in a segment, equal to model.segment_length: a document is made of whole segments."""
    segments: list[int] = Field(
        default=[2, 4, 8, 16], json_schema_extra={"minItems": 1, "uniqueItems": True}
    )
    """Lengths of the documents, in segments, in growing order."""
    documents: int = Field(default=1000, ge=1)
    """Number of documents of each length and each number of keys."""
    digits: int = Field(default=5, ge=1)
    """Number of digits in a pass key."""
    keys: (
        Annotated[int, Field(ge=1)]
        | Annotated[list[int], Field(json_schema_extra={"minItems": 1, "uniqueItems": True})]
    ) = 1
    """Pass keys in a document, with names if they are several; a list makes documents of each."""
    queries: Annotated[int, Field(ge=1)] | Literal["all", "some"] = 1
    """How many of the keys are asked for, in a random order of their own; `some` is any number."""
    values: int = Field(default=1, ge=1)
    """Numbers of each key, which are stated one by one and asked for all together."""
    form: Literal["sentence", "adjacent", "variables"] = "sentence"
    """A sentence, a name with its number (` Adam=71432. `), or variables that name each other."""
    filler: FillerKind = "standard"
    """The sentences of Mohtashami & Jaggi (2023) over and over, random letters, or real text."""
    text_files: list[str] = Field(default=[])
    """`filler: text`: paths and globs as in data.files; if empty, the files of `python-stdlib`."""

    @model_validator(mode="after")
    def _check(self) -> "PasskeyConfig":
        if self.digits >= self.segment_length:
            raise ValueError(
                f"digits ({self.digits}) must be below segment_length ({self.segment_length})"
            )
        require_growing("segments", self.segments, least=2)
        if isinstance(self.keys, list):
            require_growing("keys", self.keys, least=1)
        fewest = self.key_counts[0]
        if isinstance(self.queries, int) and self.queries > fewest:
            raise ValueError(
                f"queries ({self.queries}) must be at most the fewest keys of a document "
                f"({fewest}), or all or some"
            )
        return self

    @property
    def key_counts(self) -> list[int]:
        """The numbers of keys that documents have, in growing order."""
        return self.keys if isinstance(self.keys, list) else [self.keys]

    @property
    def task(self) -> str:
        """The name that RULER (Hsieh et al. 2024, arXiv 2404.06654) gives to such a task."""
        if self.form == "variables":
            return "vt"
        if self.values > 1:
            return "niah_multivalue"
        if self.key_counts[-1] == 1:
            return "niah_single"
        return "niah_multikey" if self.queries == 1 else "niah_multiquery"


class BabilongConfig(Settings):
    """Documents that hide facts of bAbI kind in filler and ask about them in their last segment."""

    segment_length: int = Field(default=2048, ge=1)
    """Tokens in a segment, equal to model.segment_length: a document is made of whole segments."""
    segments: list[int] = Field(
        default=[2, 4, 8, 16], json_schema_extra={"minItems": 1, "uniqueItems": True}
    )
    """Lengths of the documents, in segments, in growing order."""
    tasks: list[BabilongTask] = Field(
        default=["qa1", "qa2", "qa3", "qa8"],
        json_schema_extra={"minItems": 1, "uniqueItems": True},
    )
    """One, two or three facts to combine (`qa1`, `qa2`, `qa3`), and lists of objects (`qa8`)."""
    documents: int = Field(default=1000, ge=1)
    """Number of documents of each task and length."""
    min_facts: int = Field(default=1, ge=1)
    """The fewest facts in a document. The tasks need at least 1, 2, 3 and 1."""
    max_facts: int = Field(default=8, ge=1)
    """The most facts in a document; fewer where the segments have no room for so many."""
    max_questions: int = Field(default=1, ge=1)
    """The most questions in a document; their number is drawn. Those about steps come last."""
    answer_steps: bool = False
    """Answers of qa2 name the step before the place, who has the object: "Mary, kitchen"."""
    filler: FillerKind = "text"
    """As data.passkey.filler."""
    text_files: list[str] = Field(default=[])
    """`filler: text`: paths and globs as in data.files; if empty, the files of `python-stdlib`."""

    @model_validator(mode="after")
    def _check(self) -> "BabilongConfig":
        require_growing("segments", self.segments, least=2)
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks ({self.tasks}) must be at least one, each of them once")
        fewest = max(FEWEST_FACTS[task] for task in self.tasks)
        if self.max_facts < max(self.min_facts, fewest):
            raise ValueError(
                f"max_facts ({self.max_facts}) must be at least min_facts ({self.min_facts}), and "
                f"{fewest} for these tasks"
            )
        return self


class CorpusConfig(Settings):
    """Where documents come from, and the token store made of them."""

    source: Literal["python-stdlib", "files", "huggingface", "passkey", "babilong"] = (
        "python-stdlib"
    )
    """Python's own library sources, local files, a hub dataset, or made pass keys or facts."""
    files: list[str] = Field(default=[])
    """`files`: paths or globs of .txt (one document each), .jsonl, .json, .parquet, .gz, .zst."""
    document_separator: str = ""
    """`files`: text that begins a new document in a .txt; if empty, each .txt is one document."""
    dataset: str = ""
    """`huggingface`: dataset name or local directory."""
    dataset_config: str = ""
    """`huggingface`: configuration name, if the dataset has several."""
    dataset_split: str = "train"
    """`huggingface`: which split to read."""
    streaming: bool = True
    """`huggingface`: read as a stream instead of downloading everything first."""
    text_field: str = "text"
    """Field of a record that holds the text, in .jsonl, .parquet or datasets; or as `meta.text`."""
    weighted_field: str = ""
    """Field read instead of text_field: a list of [text, weight of the loss] or {text, weight}."""
    messages_field: str = ""
    """Field read instead of text_field: a chat, a list of {role, content}, by a chat template."""
    max_documents: int = Field(default=0, ge=0)
    """Stop after this many documents; 0 means all."""
    held_out_fraction: float = Field(default=0.02, ge=0, lt=1)
    """Share of documents kept for evaluation. A hash of the text decides, so it never changes."""
    store: PathText = ""
    """Directory of the token store that `infini-ds prepare` writes; must be given."""
    passkey: PasskeyConfig = PasskeyConfig()
    """`passkey`: the documents to generate."""
    babilong: BabilongConfig = BabilongConfig()
    """`babilong`: the documents to generate."""

    @property
    def made(self) -> PasskeyConfig | BabilongConfig | None:
        """The settings of documents that the source makes itself, if it does."""
        return {"passkey": self.passkey, "babilong": self.babilong}.get(self.source)

    @property
    def weighted(self) -> bool:
        """Whether the store has a weight for each token."""
        return self.made is not None or bool(self.weighted_field or self.messages_field)

    @property
    def field_setting(self) -> str:
        """The setting that names the field of a record that is read."""
        special = ("messages_field", "weighted_field")
        return next((name for name in special if getattr(self, name)), "text_field")

    @property
    def grouped(self) -> bool:
        """Whether the store has a group for each document: its number of pass keys."""
        return self.source == "passkey" and isinstance(self.passkey.keys, list)

    @model_validator(mode="after")
    def _check_corpus(self) -> "CorpusConfig":
        if self.source == "files" and not self.files:
            raise ValueError("files must name at least one path or glob when source is files")
        if self.source == "huggingface" and not self.dataset:
            raise ValueError("dataset must be named when source is huggingface")
        field = self.field_setting
        if field != "text_field" and self.source not in ("files", "huggingface"):
            raise ValueError(f"{field} must be empty unless source is files or huggingface")
        if self.messages_field and self.weighted_field:
            raise ValueError("messages_field must be empty when weighted_field is given")
        return self


class MixtureCorpus(CorpusConfig):
    """One named corpus of a mixture. It also has all settings of `data` above, including store."""

    weight: float = Field(default=1.0, ge=1e-6, le=1e6)
    """Its share of the training tokens, relative to the weights of the other corpora."""


class DataConfig(CorpusConfig):
    """Where documents come from, and the token store made of them."""

    tokenizer: TokenizerConfig = TokenizerConfig()
    """The tokenizer, which turns text into token ids."""
    mixture: dict[str, MixtureCorpus] = Field(
        default={}, json_schema_extra={"propertyNames": {"pattern": f"^{_CORPUS_NAME}$"}}
    )
    """Several corpora by name, instead of a single one. They share the tokenizer."""
    packing: bool = True
    """Fill the free ends of segments with whole short documents. Not used with a curriculum."""

    @property
    def corpora(self) -> dict[str, "DataConfig"]:
        """The corpora by name, in alphabetical order, each with the tokenizer.

        A single corpus is here too, under the name "", so that nothing else needs to ask whether
        the data is a mixture.
        """
        if not self.mixture:
            return {"": self}
        return {name: self._alone(self.mixture[name]) for name in sorted(self.mixture)}

    @property
    def weights(self) -> dict[str, float]:
        """The weights of a mixture's corpora by name, in the order of `corpora`; else empty."""
        return {name: self.mixture[name].weight for name in sorted(self.mixture)}

    def with_corpora(self, change: Callable[[CorpusConfig], dict[str, Any]]) -> "DataConfig":
        """Replaces settings of each corpus; the new values are not validated.

        Args:
            change: returns, for a corpus, the settings to replace.
        """
        if not self.mixture:
            return self.model_copy(update=change(self))
        changed = {
            name: corpus.model_copy(update=change(corpus)) for name, corpus in self.mixture.items()
        }
        return self.model_copy(update={"mixture": changed})

    def _alone(self, corpus: MixtureCorpus) -> "DataConfig":
        settings = {name: getattr(corpus, name) for name in CorpusConfig.model_fields}
        tree = {**settings, "tokenizer": self.tokenizer}
        return DataConfig.model_validate(tree, context=RESOLVED)  # as_path was applied already

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if not self.mixture:
            if "store" not in self.model_fields_set:
                raise ValueError("store must name the directory of the token store")
            if self.source == "passkey" and self.tokenizer.kind != "bytes":
                raise ValueError("tokenizer.kind must be bytes when source is passkey")
            kind, model = self.tokenizer.kind, self.tokenizer.model
            if self.messages_field and kind == "sentencepiece" and not model:
                raise ValueError(
                    "tokenizer.model must name a model when messages_field is given; "
                    "tokenizer/train.sh trains one"
                )
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
            if not re.fullmatch(_CORPUS_NAME, name):
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
