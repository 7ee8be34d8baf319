"""Reads the fp32 weights that a run's optimizer keeps from DeepSpeed's files of its shards."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from infini_ds.errors import UserError
from infini_ds.model.trained import is_trained
from infini_ds.parallel.deepspeed.module import single_process_name
from infini_ds.runs.directory import Checkpoint, Depth
from infini_ds.runs.shards import Shards, has_shards, shard_files
from infini_ds.runs.weights import Weights

_SHARD_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")


@dataclass
class _Fragment:
    """Location of a parameter, or a part of it, in a shard; stands in for DeepSpeed's class."""

    numel: int = 0
    start: int = 0


class _Unused:
    """Stands in for the DeepSpeed objects that are stored beside the shards."""

    def __new__(cls, *_):
        return super().__new__(cls)


class _Piece(NamedTuple):
    file: Path
    group: int
    fragment: _Fragment


class MasterWeights:
    """fp32 weights of a checkpoint, each assembled from the shards of all data-parallel ranks.

    Args:
        checkpoint: a run's checkpoint.
        computed: the weights that the run computes with, of which those are taken that it does not
            train.
        patterns: the run's optimizer.train.

    Raises:
        UserError: the checkpoint has no such shards, or a shard is damaged.
    """

    def __init__(self, checkpoint: Path, computed: Weights, patterns: list[str]):
        self.origin = f"optimizer states of checkpoint {checkpoint}"
        self.metas = {
            name: torch.empty_like(meta, dtype=torch.float32)
            for name, meta in computed.metas.items()
        }
        self._computed = computed
        self._pieces: dict[str, list[_Piece]] = {}
        self._shards = None
        if has_shards(checkpoint):
            _check(checkpoint, [path.name for path in shard_files(checkpoint)])
            self._shards = Shards(checkpoint)
            return
        for file, stage in _shard_files(checkpoint):
            mappings = _load(file)["param_slice_mappings"]
            for group, mapping in enumerate(mappings):
                for name, fragment in mapping.items():
                    pieces = self._pieces.setdefault(single_process_name(name), [])
                    # A tied weight is kept on both the first and the last stage.
                    if not pieces or _stage(pieces[0].file) == stage:
                        pieces.append(_Piece(file, group, fragment))
        for name, meta in self.metas.items():
            if not is_trained(name, patterns):
                self._pieces.pop(name, None)
                continue
            found = sum(piece.fragment.numel for piece in self._pieces.get(name, ()))
            if found != meta.numel():
                raise UserError(f"{self.origin}: have {found} of {meta.numel()} numbers of {name}")

    def read(self, name: str) -> Tensor:
        """See Weights."""
        if self._shards is not None and name in self._shards.shapes:
            return self._shards.read(name, "fp32").view(self.metas[name].shape)
        if name not in self._pieces:
            return self._computed.read(name).float()
        parts = []
        for file, group, fragment in self._pieces[name]:
            shard = _load(file)["single_partition_of_fp32_groups"][group]
            parts.append(shard.narrow(0, fragment.start, fragment.numel))
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole.view(self.metas[name].shape)


def _shard_files(checkpoint: Path) -> list[tuple[Path, int]]:
    """Lists the files of the optimizer's shards with their stages, in the order of the ranks."""
    matches = [(_SHARD_FILE.fullmatch(file.name), file) for file in checkpoint.iterdir()]
    found = [(int(match[2]), int(match[1]), file) for match, file in matches if match]
    if not found:
        raise UserError(
            f"checkpoint {checkpoint}: has no fp32 weights of the optimizer; leave out --dtype fp32"
        )
    _check(checkpoint, [file.name for *_, file in found])
    return [(file, stage) for stage, _, file in sorted(found)]


def _check(checkpoint: Path, names: list[str]) -> None:
    """Raises UserError if one of a checkpoint's files is not as it was written."""
    if problem := Checkpoint(checkpoint).problem(Depth.CHECKSUMS, names):
        raise UserError(
            f"checkpoint {checkpoint}: {problem}; choose another step, or leave out --dtype fp32"
        )


def _stage(file: Path) -> int:
    return int(_SHARD_FILE.fullmatch(file.name)[2])  # type: ignore[index]


def _load(file: Path) -> dict[str, Any]:
    """Maps the optimizer's state from its file without running any code of DeepSpeed's."""
    with torch.serialization.safe_globals(_STAND_INS):
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return content["optimizer_state_dict"]


_STAND_INS = [
    (_Fragment, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_Unused, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Unused, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]
