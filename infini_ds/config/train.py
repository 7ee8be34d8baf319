"""How much a run reads, for how long, and what it keeps."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from infini_ds.config.settings import RangeText, Settings, require_growing

_WEEK = 7 * 24 * 3600


class CurriculumConfig(Settings):
    """Documents of growing lengths, the next one when the answers to this one are right."""

    segments: list[int] = Field(
        default=[2, 4, 8, 16], json_schema_extra={"minItems": 1, "uniqueItems": True}
    )
    """Lengths of the documents, in segments, one after another; each divides the window."""
    advance_at: float = Field(default=0.9, gt=0, le=1)
    """Share of answers that must be right, over `window` steps, before the next length begins."""
    window: int = Field(default=20, ge=1)
    """Steps at a length over which the share of right answers is taken."""
    review: float = Field(default=0.5, ge=0, lt=1)
    """Share of the steps that read documents of the earlier lengths, in turn."""

    @model_validator(mode="after")
    def _check(self) -> "CurriculumConfig":
        require_growing("segments", self.segments, least=1)
        return self


class TrainConfig(Settings):
    """One run: how much is read in a step, for how long, and what is kept."""

    steps: int = Field(ge=1)
    """Optimizer steps of the whole run."""
    batch_size: int = Field(ge=1)
    """Lanes in the global batch: each contributes one window to a step."""
    micro_batch_size: int = Field(default=1, ge=1)
    """Lanes that go through the pipeline together on one data-parallel rank."""
    window_segments: int = Field(default=1, ge=1)
    """Segments of a window (K): how far gradients flow back through the memory."""
    chunks: int = Field(default=1, ge=1)
    """Parts into which a window is cut on its way through the pipeline: shorter bubbles."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute type; `auto`: bf16 where it is the faster one. Memories and sums are fp32 always."""
    activation_checkpointing: Literal["none", "attention", "block"] = "none"
    """What is computed again in the backward pass instead of being kept."""
    loss_chunk_tokens: int = Field(default=0, ge=0)
    """Tokens whose logits exist at one time in the loss; 0: 1024 on a CPU, 2^28 logits on a GPU."""
    save_every: int = Field(default=500, ge=1)
    """Steps between checkpoints; one is always written at the end."""
    keep_last: int = Field(default=3, ge=1)
    """Checkpoints kept; older ones are deleted once a newer one is valid."""
    log_every: int = Field(default=1, ge=1)
    """Steps between lines of metrics.jsonl and TensorBoard scalars."""
    on_bad_step: Literal["skip", "stop", "rollback"] = "skip"
    """Corrupt tokens, loss or gradient not finite: no update, an error, or back to a checkpoint."""
    max_skipped_steps: int = Field(default=10, ge=1)
    """Consecutive bad steps, or rollbacks to the same checkpoint, before the run stops."""
    timeout: Annotated[
        float, Field(gt=0, le=_WEEK), RangeText(f"above 0 seconds and at most {_WEEK} (a week)")
    ] = 600.0
    """Seconds that any process waits for another before it gives up and says for what."""
    hang_timeout: float | None = None
    """Seconds in which a process must get something done or ends; by default half of timeout."""
    threads: int = Field(default=0, ge=0, le=1024)
    """CPU threads a process; 0 means the machine's cores divided among its local processes."""
    curriculum: CurriculumConfig | None = None
    """Documents of growing lengths; by default all documents are read in one random order."""

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
