"""Pretraining of Infini-Transformers (arXiv 2404.07143) on DeepSpeed."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from infini_ds.config import ModelConfig
    from infini_ds.model.memory import Memory
    from infini_ds.model.transformer import InfiniTransformer
    from infini_ds.runs.export import load_model

__all__ = ["InfiniTransformer", "Memory", "ModelConfig", "load_model"]


def __getattr__(name: str):
    # Loaded on demand: the command line answers before torch, and helps before pydantic, is loaded.
    if name == "ModelConfig":
        from infini_ds.config import ModelConfig

        return ModelConfig
    if name == "InfiniTransformer":
        from infini_ds.model.transformer import InfiniTransformer

        return InfiniTransformer
    if name == "Memory":
        from infini_ds.model.memory import Memory

        return Memory
    if name == "load_model":
        from infini_ds.runs.export import load_model

        return load_model
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("infini-ds")
        except PackageNotFoundError:
            return "of a directory that is not installed"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
