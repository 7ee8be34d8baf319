"""How much a run reads, for how long, and what it keeps."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from infini_ds.config.settings import RangeText, Settings, require_growing

_WEEK = 7 * 24 * 3600


class CurriculumConfig(Settings):
    """Documents of growing lengths: the next length begins once enough answers are right."""

    segments: list[int] = Field(
        default=[2, 4, 8, 16], json_schema_extra={"minItems": 1, "uniqueItems": True}
    )
    """Lengths of the documents, in segments, one after another; each divides the window."""
    keys: list[int] = Field(default=[], json_schema_extra={"uniqueItems": True})
    """Numbers of pass keys: one after another at the first length, in turn at longer ones."""
    advance_at: float = Field(default=0.9, gt=0, le=1)
    """Share of answers that must be right, over `window` steps, before the next length begins."""
    window: int = Field(default=20, ge=1)
    """Steps at a length over which the share of right answers is taken."""
    review: float = Field(default=0.5, ge=0, lt=1)
    """Share of the steps that read documents of the earlier lengths, in turn."""

    @model_validator(mode="after")
    def _check(self) -> "CurriculumConfig":
        require_growing("segments", self.segments, least=1)
        if self.keys:
            require_growing("keys", self.keys, least=1)
        return self


class ProfileConfig(Settings):
    """Traces of a few steps on every rank, in output_dir/profile."""

    steps: list[int] = Field(json_schema_extra={"minItems": 2, "maxItems": 2})
    """The first and the last step that are traced."""

    @model_validator(mode="after")
    def _check(self) -> "ProfileConfig":
        if len(self.steps) != 2 or not 1 <= self.steps[0] <= self.steps[1]:
            raise ValueError(
                f"steps ({self.steps}) must be the first step and the last, such as [20, 24]"
            )
        return self


class TrainConfig(Settings):
    """A run: how much it reads in a step, for how long it trains, and what it keeps."""

    steps: int = Field(ge=1)
    """Optimizer steps of the whole run."""
    batch_size: int = Field(ge=1)
    """Lanes in the global batch. Each contributes one window to a step."""
    micro_batch_size: int = Field(default=1, ge=1)
    """Lanes that go through the pipeline together on one data-parallel rank."""
    window_segments: int = Field(default=1, ge=1)
    """Segments of a window (K): how far gradients flow back through the memory."""
    chunks: int = Field(default=1, ge=1)
    """Parts that a window is cut into for the pipeline. More of them make bubbles shorter."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute type; `auto` is bf16 where that is faster. Memories and sums are always fp32."""
    activation_checkpointing: Literal["none", "attention", "block"] = "none"
    """The part that is computed again in the backward pass, so that it need not be kept."""
    compile: bool = False
    """Compile what training computes of a block around its attention; needs a C++ compiler."""
    loss_chunk_tokens: int = Field(default=0, ge=0)
    """Tokens whose logits exist at one time; 0 means 1024 on a CPU, 2^28 logits on a GPU."""
    save_every: int = Field(default=500, ge=1)
    """Steps between checkpoints. One is always written at the end."""
    keep_last: int = Field(default=3, ge=1)
    """Checkpoints to keep. Older ones are deleted once a newer one is valid."""
    async_save: bool = False
    """Copy a checkpoint into host memory and write it while training goes on; needs room there."""
    log_every: int = Field(default=1, ge=1)
    """Steps between lines of metrics.jsonl and TensorBoard scalars."""
    on_bad_step: Literal["skip", "stop", "rollback"] = "skip"
    """Corrupt tokens, loss or gradient not finite: no update, an error, or back to a checkpoint."""
    max_skipped_steps: int = Field(default=10, ge=1)
    """Consecutive bad steps, or rollbacks to the same checkpoint, before the run stops."""
    timeout: Annotated[
        float, Field(gt=0, le=_WEEK), RangeText(f"above 0 seconds and at most {_WEEK} (a week)")
    ] = 600.0
    """Seconds that a process waits for another before it gives up and says what it waited for."""
    hang_timeout: float | None = None
    """A process that gets nothing done for so many seconds ends; by default half of timeout."""
    threads: int = Field(default=0, ge=0, le=1024)
    """CPU threads of a process; 0 divides the machine's cores among its local processes."""
    curriculum: CurriculumConfig | None = None
    """Documents of growing lengths. By default all documents are read in one random order."""
    profile: ProfileConfig | None = None
    """Steps of which PyTorch's profiler makes traces. By default there are none."""

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
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
        if self.hang_timeout is not None and not 0 < self.hang_timeout < self.timeout:
            raise ValueError(
                f"hang_timeout ({self.hang_timeout}) must be above 0 and below timeout "
                f"({self.timeout}) seconds"
            )
        for length in self.curriculum.segments if self.curriculum else []:
            if self.window_segments % length:
                raise ValueError(
                    f"window_segments ({self.window_segments}) must be a multiple of each of "
                    f"curriculum.segments, is not of {length}"
                )
        return self
