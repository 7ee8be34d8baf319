"""An export, as its config.yaml describes it."""

from pathlib import Path

from pydantic import model_validator

from infini_ds.config.data import TOKENIZER_FILES, TokenizerKind
from infini_ds.config.model import ModelConfig
from infini_ds.config.settings import Settings


class ExportConfig(Settings):
    """A model outside of any run, and the tokenizer beside it."""

    model: ModelConfig
    """The Infini-Transformer itself, with the size of its vocabulary."""
    tokenizer: TokenizerKind | None = None
    """Kind of the tokenizer, as in data.tokenizer; None if there is none that can be read."""
    directory: str
    """Directory that the export is in, and so the tokenizer's file. It is not in config.yaml."""

    @property
    def tokenizer_file(self) -> str:
        """The file of the tokenizer; empty if it needs none, or if there is no tokenizer."""
        file = TOKENIZER_FILES[self.tokenizer] if self.tokenizer else ""
        return str(Path(self.directory) / file) if file else ""

    @model_validator(mode="after")
    def _check(self) -> "ExportConfig":
        if not self.model.vocab_size:
            raise ValueError("model.vocab_size must be given")
        return self
