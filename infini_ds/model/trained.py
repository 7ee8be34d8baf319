"""Chooses the parameters that a run trains by their names; all others keep their values."""

from fnmatch import fnmatchcase

from infini_ds.config import ModelConfig, OptimizerConfig
from infini_ds.errors import UserError
from infini_ds.model.layers import layer_shapes
from infini_ds.model.optimizer import group_of

_NAMES_TOLD = 8


def trained_counts(config: ModelConfig, patterns: list[str], among: str = "*") -> list[int]:
    """Counts the trained parameters of each layer of `layer_list`, without allocating any.

    Args:
        config: model.vocab_size must be set.
        patterns: optimizer.train; if empty, all parameters are trained.
        among: a pattern of the names that count.

    Raises:
        UserError: a pattern matches no parameter.
    """
    layers = layer_shapes(config)
    names = [name for layer in layers for name in layer]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(
                f"optimizer.train: {pattern!r} is the name of no parameter; names are "
                f"{', '.join(names[:_NAMES_TOLD])}, ..., and * stands for any part of a name"
            )
    return [
        sum(
            meta.numel()
            for name, meta in layer.items()
            if is_trained(name, patterns) and fnmatchcase(name, among)
        )
        for layer in layers
    ]


def trained_groups(config: ModelConfig, optimizer: OptimizerConfig) -> set[str]:
    """Returns the names of the optimizer's groups that have trained parameters in any layer."""
    return {
        group_of(name, meta, optimizer.name)
        for layer in layer_shapes(config)
        for name, meta in layer.items()
        if is_trained(name, optimizer.train)
    }


def is_trained(name: str, patterns: list[str]) -> bool:
    """Returns whether a parameter of InfiniTransformer is trained."""
    return not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)
