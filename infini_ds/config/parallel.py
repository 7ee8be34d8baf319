"""How the work is laid out over processes."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from infini_ds.config.settings import Settings
from infini_ds.errors import UserError


class ParallelConfig(Settings):
    """How the work is laid out over processes. Losses do not depend on it."""

    pipeline_stages: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Pipeline degree; `auto`: the largest that divides the processes and fits the layers."""
    memory_transport: Literal["carried", "resident"] = "carried"
    """Memories ride with the activations and return to the first stage, or stay at their stage."""
    zero_stage: Literal[0, 1] = 1
    """ZeRO: 1 shards the optimizer's states over the data-parallel ranks."""
    offload_optimizer: bool = False
    """Keep the optimizer's states in CPU memory (needs zero_stage 1)."""

    @model_validator(mode="after")
    def _check(self) -> "ParallelConfig":
        if self.offload_optimizer and self.zero_stage != 1:
            raise ValueError(f"zero_stage ({self.zero_stage}) must be 1 with offload_optimizer")
        return self

    def resolve_stages(self, world_size: int, num_layers: int) -> int:
        """Pipeline degree for this many processes.

        Raises:
            UserError: the degree does not divide the processes or exceeds the layers.
        """
        if self.pipeline_stages == "auto":
            return next(s for s in range(min(world_size, num_layers), 0, -1) if world_size % s == 0)
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
        return self.pipeline_stages
