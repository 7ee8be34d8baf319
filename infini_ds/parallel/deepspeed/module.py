"""DeepSpeed's PipelineModule, partitioned where we choose."""

from collections.abc import Iterator

import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import nn

TIED_KEY = "embedding"
_TIED = f"tied_modules.{TIED_KEY}."


class StageModule(PipelineModule):
    """The layers of one stage.

    Args:
        layers: of all stages: first one layer, then the Transformer blocks, then any number.
        bounds: first block of each stage, followed by the number of blocks; the layers before and
            after the blocks are on the first and the last stage.
    """

    def __init__(self, layers: list[LayerSpec], bounds: list[int]):
        self.bounds = bounds
        super().__init__(layers=layers, num_stages=len(bounds) - 1, partition_method="flops")

    def placed_layers(self) -> Iterator[tuple[int, nn.Module]]:
        """Yields this stage's layers that are modules, each with its index among all layers."""
        for place, layer in enumerate(self.forward_funcs, start=self._local_start):
            if isinstance(layer, nn.Module):
                yield place, layer

    @torch.no_grad()  # or PyTorch warns of a gradient through the broadcast in the first step
    def _synchronize_tied_weights(self) -> None:
        super()._synchronize_tied_weights()

    def _partition_layers(self, method: str = "flops") -> None:
        blocks = [1 + bound for bound in self.bounds]
        self.parts = [0, *blocks[1:-1], self._num_layers]
        self._set_bounds(self.parts[self.stage_id], self.parts[self.stage_id + 1])


def single_process_name(name: str) -> str:
    """Returns a pipeline parameter's name in InfiniTransformer."""
    return "layers." + (name.replace(_TIED, "0.") if name.startswith(_TIED) else name)


def pipeline_name(name: str, tied: bool) -> str:
    """Returns the name in a pipeline, of a model whose embeddings are tied or not."""
    name = name.removeprefix("layers.")
    return _TIED + name.removeprefix("0.") if tied and name.startswith("0.") else name
