"""A complete run: all sections together."""

from typing import Literal

from pydantic import Field, model_validator

from infini_ds.config.data import DataConfig
from infini_ds.config.model import ModelConfig
from infini_ds.config.optimizer import OptimizerConfig
from infini_ds.config.parallel import ParallelConfig
from infini_ds.config.settings import PathText, Settings
from infini_ds.config.train import TrainConfig
from infini_ds.errors import UserError


class KernelsConfig(Settings):
    """The implementation of Infini-attention. The results do not depend on it."""

    backend: Literal["auto", "torch", "triton"] = "auto"
    """Triton kernels (CUDA, bf16, head_dim 64 or 128), PyTorch's operators, or whichever fits."""


class EvaluationConfig(Settings):
    """Evaluation on held-out documents during the run and at its end."""

    every: int = Field(default=500, ge=0)
    """Steps between evaluations. There is always one at the end; 0 means only that."""
    max_segments: int = Field(default=512, ge=0)
    """Held-out documents are read whole and in order up to this many segments; 0 means all."""
    sample_tokens: int = Field(default=64, ge=0)
    """Length of the sample text that each evaluation generates; 0 means none."""
    sample_prompt: str = ""
    """Text that the sample continues. If empty, the sample is the beginning of a document."""


class WandbConfig(Settings):
    """A run of Weights & Biases with the figures of this run; needs `infini-ds[wandb]`."""

    project: str = "infini-ds"
    """Project that the run belongs to."""
    entity: str = ""
    """User or team that owns the project; if empty, the one that is logged in."""
    mode: Literal["online", "offline"] = "online"
    """`offline` writes only into output_dir, from where `wandb sync` sends it."""


class MonitorConfig(Settings):
    """Where the run's figures go, beside metrics.jsonl and TensorBoard."""

    wandb: WandbConfig | None = None
    """A run of Weights & Biases. By default there is none."""
    recorders: list[str] = Field(default=[])
    """Classes of your own that get the figures too, as package.module:Class (`Recorder`)."""


class RunConfig(Settings):
    """A complete run."""

    output_dir: PathText
    """Directory of the run: checkpoints, metrics.jsonl, TensorBoard events, resolved config."""
    seed: int = 0
    """Seed of the initial weights and of the order of documents."""
    resume: bool = True
    """Go on from the newest valid checkpoint in output_dir. If false, refuse if there is one."""
    init_from: PathText = ""
    """Export to start from, with its `model` and `data.tokenizer`. If empty, weights are random."""
    model: ModelConfig
    """The Infini-Transformer itself."""
    data: DataConfig
    """Where documents come from."""
    train: TrainConfig
    """How much the run reads in a step, for how long it trains, and what it keeps."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer and its learning rate."""
    parallel: ParallelConfig = ParallelConfig()
    """Layout over processes."""
    kernels: KernelsConfig = KernelsConfig()
    """The implementation of Infini-attention."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Evaluation on held-out documents."""
    monitor: MonitorConfig = MonitorConfig()
    """Where the run's figures go, beside metrics.jsonl and TensorBoard."""

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        if not self.output_dir:
            raise ValueError("output_dir must name a directory")
        read = self.model.segment_length
        for corpus in self.data.corpora.values():
            if corpus.made and corpus.made.segment_length != read:
                raise ValueError(
                    f"data.{corpus.source}.segment_length ({corpus.made.segment_length}) must be "
                    f"model.segment_length ({read})"
                )
        if self.kernels.backend == "triton" and not self.model.has_kernels:
            raise ValueError(
                "kernels.backend (triton) must be auto or torch with model.memory_rule "
                f"{self.model.memory_rule}, which the Triton kernels do not compute"
            )
        if self.optimizer.name == "muon" and self.parallel.offload_optimizer:
            raise ValueError(
                "optimizer.name (muon) must be adamw with parallel.offload_optimizer, since only "
                "AdamW runs on the CPU"
            )
        if self.optimizer.name == "muon" and self.parallel.shards_gradients:
            raise ValueError(
                "optimizer.name (muon) must be adamw with parallel.zero_stage "
                f"{self.parallel.zero_stage}, where no rank has a whole gradient"
            )
        if self.train.compile and self.optimizer.train:
            raise ValueError(
                "train.compile (true) must be false with optimizer.train, which would make every "
                "block another one to compile"
            )
        segments = self.train.window_segments // self.train.chunks
        if segments % self.parallel.context_parallel:
            raise ValueError(
                f"parallel.context_parallel ({self.parallel.context_parallel}) must divide the "
                f"segments of a chunk ({segments} = train.window_segments "
                f"{self.train.window_segments} / train.chunks {self.train.chunks}); lower it or "
                "train.chunks, or raise train.window_segments"
            )
        if self.data.weights and self.train.curriculum:
            raise ValueError("train.curriculum must be left out with data.mixture")
        self._check_curriculum_of_keys()
        return self

    def _check_curriculum_of_keys(self) -> None:
        wanted = self.train.curriculum.keys if self.train.curriculum else []
        made = self.data.passkey.key_counts if self.data.grouped else []
        if not set(wanted) <= set(made):
            raise ValueError(
                f"train.curriculum.keys ({wanted}) must be left out unless data.source is passkey "
                "and data.passkey.keys is a list that has them"
            )

    @property
    def packed(self) -> bool:
        """Whether segments are packed in training; never with a curriculum, whose documents fill
        windows as they are."""
        return self.data.packing and self.train.curriculum is None

    @property
    def step_tokens(self) -> int:
        """Tokens of a step if none of its positions were padding."""
        train = self.train
        return train.batch_size * train.window_segments * self.model.segment_length

    def data_parallel_size(self, world_size: int) -> int:
        """Data-parallel degree for this many processes.

        Raises:
            UserError: the processes or the batch cannot be divided as the config asks.
        """
        stages = self.parallel.resolve_stages(world_size, self.model.num_layers)
        data = world_size // stages
        context, micro = self.parallel.context_parallel, self.train.micro_batch_size
        groups = data // context
        if self.train.batch_size % (groups * micro):
            size = f"data-parallel size ({data})"
            if context > 1:
                size += f" / parallel.context_parallel ({context})"
            remedy = ""
            if self.train.batch_size < groups * micro:
                remedy = (
                    f"; there are too many ranks for its lanes: raise it to {groups * micro}, or "
                    "let more ranks share windows (parallel.context_parallel)"
                )
            raise UserError(
                f"train.batch_size ({self.train.batch_size}) must be a multiple of "
                f"train.micro_batch_size ({micro}) x {size}{remedy}"
            )
        return data

    def lanes_of_a_rank(self, data: int) -> int:
        """Lanes that each of so many data-parallel ranks reads, alone or with those that share its
        windows."""
        return self.train.batch_size * self.parallel.context_parallel // data
