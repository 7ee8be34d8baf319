"""The one typed tree of settings: YAML files, dotted overrides, clear errors.

Every field has a docstring, and a number has a range if not all values make sense. The reference
and the JSON schema are generated from them (`infini-ds config`). A module receives its own subtree,
never the whole tree. This package imports neither torch nor DeepSpeed, so that mistakes are
reported at once.
"""

from infini_ds.config.data import (
    FEWEST_FACTS,
    TOKENIZER_FILES,
    BabilongConfig,
    BabilongTask,
    CorpusConfig,
    DataConfig,
    FillerKind,
    MixtureCorpus,
    PasskeyConfig,
    TokenizerConfig,
)
from infini_ds.config.export import ExportConfig
from infini_ds.config.loading import dump, load, load_resolved, parse, parse_export
from infini_ds.config.model import LARGEST_GATE, MemoryConfig, ModelConfig, RopeScaling
from infini_ds.config.optimizer import OptimizerConfig
from infini_ds.config.parallel import ParallelConfig
from infini_ds.config.reference import reference, schema
from infini_ds.config.run import (
    EvaluationConfig,
    KernelsConfig,
    MonitorConfig,
    RunConfig,
    WandbConfig,
)
from infini_ds.config.settings import RESOLVED
from infini_ds.config.train import CurriculumConfig, ProfileConfig, TrainConfig

__all__ = [
    "FEWEST_FACTS",
    "LARGEST_GATE",
    "RESOLVED",
    "TOKENIZER_FILES",
    "BabilongConfig",
    "BabilongTask",
    "CorpusConfig",
    "CurriculumConfig",
    "DataConfig",
    "EvaluationConfig",
    "ExportConfig",
    "FillerKind",
    "KernelsConfig",
    "MemoryConfig",
    "MixtureCorpus",
    "ModelConfig",
    "MonitorConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PasskeyConfig",
    "ProfileConfig",
    "RopeScaling",
    "RunConfig",
    "TokenizerConfig",
    "TrainConfig",
    "WandbConfig",
    "dump",
    "load",
    "load_resolved",
    "parse",
    "parse_export",
    "reference",
    "schema",
]
