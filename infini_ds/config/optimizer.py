"""The optimizer and its learning rate."""

from typing import Literal

from pydantic import Field

from infini_ds.config.settings import SMALLEST_EPSILON, Settings


class OptimizerConfig(Settings):
    """The optimizer and its learning rate."""

    name: Literal["adamw", "muon"] = "adamw"
    """`muon`: Muon for the projections of blocks, at AdamW's learning rate; AdamW for the rest."""
    train: list[str] = Field(default=[], json_schema_extra={"uniqueItems": True})
    """Patterns of the names of parameters to train, such as `*.beta`; if empty, all are."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """Peak learning rate."""
    min_learning_rate_ratio: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the end, as a share of the peak."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After warm-up: cosine to the end, or stable and then a linear decay (warmup-stable-decay)."""
    warmup_steps: int = Field(default=100, ge=0)
    """Steps of linear warm-up."""
    decay_steps: int = Field(default=0, ge=0)
    """`wsd`: steps of the final decay; 0 means a fifth of train.steps."""
    write_penalty_warmup_steps: int = Field(default=0, ge=0)
    """Steps over which model.memory.write_penalty grows linearly from 0 to its value."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decay of matrices; embeddings, gates, short convolutions and a head beside Muon have none."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = Field(default=1e-8, ge=SMALLEST_EPSILON, le=1)
    """Epsilon of AdamW."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """`muon`: decay of the momentum (Nesterov's)."""
    ns_steps: int = Field(default=5, ge=1, le=99)
    """`muon`: Newton-Schulz steps that make an update orthogonal."""
    gate_learning_rate_multiplier: float = Field(default=1.0, ge=0)
    """Learning rate of the memory gates (beta), relative to the rest."""
    gradient_clipping: float = Field(default=1.0, ge=0)
    """Largest norm of the whole gradient; 0 means no clipping."""
