"""How the work is laid out over processes."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from infini_ds.config.settings import PathText, Settings
from infini_ds.errors import UserError


class ParallelConfig(Settings):
    """How the work is laid out over processes. Losses do not depend on it."""

    pipeline_stages: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Pipeline degree; `auto`: the largest that divides the processes and fits the layers."""
    context_parallel: int = Field(default=1, ge=1)
    """Data-parallel ranks that share windows: each reads an equal part of a chunk's segments."""
    memory_transport: Literal["carried", "resident"] = "carried"
    """Memories ride with the activations and return to the first stage, or stay at their stage."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """ZeRO: 1 shards optimizer states, 2 also gradients, 3 also weights; above 1 no pipeline."""
    offload_optimizer: bool = False
    """Keep the optimizer's states in CPU memory (needs zero_stage 1 or more)."""
    offload_weights: bool = False
    """Keep weights in CPU memory until they are used (needs zero_stage 3, offload_optimizer)."""
    nvme_path: PathText = ""
    """Directory on a local disk that keeps offloaded weights in place of CPU memory."""

    @model_validator(mode="after")
    def _check(self) -> "ParallelConfig":
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("zero_stage (0) must be at least 1 with offload_optimizer")
        if self.offload_weights and self.zero_stage != 3:
            raise ValueError(f"zero_stage ({self.zero_stage}) must be 3 with offload_weights")
        if self.offload_weights and not self.offload_optimizer:
            raise ValueError("offload_optimizer must be true with offload_weights")
        if self.nvme_path and not self.offload_weights:
            raise ValueError("offload_weights must be true with nvme_path")
        if self.shards_gradients and self.pipeline_stages not in (1, "auto"):
            raise ValueError(
                f"zero_stage ({self.zero_stage}) must be 0 or 1 with pipeline_stages "
                f"({self.pipeline_stages}) above 1"
            )
        return self

    @property
    def shards_gradients(self) -> bool:
        """Whether ZeRO shards more than the optimizer's states, which excludes a pipeline."""
        return self.zero_stage >= 2

    def resolve_stages(self, world_size: int, num_layers: int) -> int:
        """Pipeline degree for this many processes.

        Raises:
            UserError: the degrees do not divide the processes, or stages exceed the layers.
        """
        context = self.context_parallel
        if world_size % context:
            raise UserError(
                f"parallel.context_parallel ({context}) must divide the number of processes "
                f"({world_size}); start {_nearest(world_size, context)}, or lower it"
            )
        if self.shards_gradients:
            return 1
        if self.pipeline_stages == "auto":
            pipelines = world_size // context
            return next(s for s in range(min(pipelines, num_layers), 0, -1) if pipelines % s == 0)
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
        if world_size % (self.pipeline_stages * context):
            raise UserError(
                f"parallel.pipeline_stages ({self.pipeline_stages}) x parallel.context_parallel "
                f"({context}) must divide the number of processes ({world_size}); start "
                f"{_nearest(world_size, self.pipeline_stages * context)}, or lower one of them"
            )
        return self.pipeline_stages

    def describe(self, stages: int, data: int) -> str:
        """Describes a layout of so many stages and data-parallel ranks in words."""
        shared = (
            f" ({self.context_parallel} ranks to a window)" if self.context_parallel > 1 else ""
        )
        why = f" (ZeRO-{self.zero_stage} has no pipeline)" if self.shards_gradients else ""
        return f"{stages} pipeline stages x {data} data-parallel{shared}{why}"


def _nearest(count: int, divisor: int) -> str:
    """Names the multiples of a number next to a count that is none."""
    below = count // divisor * divisor
    return f"{below} or {below + divisor}" if below else str(divisor)
