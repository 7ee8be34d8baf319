"""Runs DeepSpeed's converter to the universal form, as its own program.

    python -m infini_ds.parallel.deepspeed.to_universal --input_folder ... --output_folder ...

DeepSpeed expects both of AdamW's moments of every parameter, and Muon has but one.
"""

import multiprocessing
from typing import Any

from deepspeed.checkpoint import DeepSpeedCheckpoint, ds_to_universal
from deepspeed.checkpoint.constants import BASE_OPTIMIZER_STATE, OPTIMIZER_STATE_DICT

_get_state = DeepSpeedCheckpoint.get_zero_checkpoint_state
_dump_fragment = ds_to_universal.dump_param_fragment


def _state_with_both_moments(checkpoint: DeepSpeedCheckpoint, *args: Any, **which: Any) -> dict:
    state = _get_state(checkpoint, *args, **which)
    for group in state[OPTIMIZER_STATE_DICT][BASE_OPTIMIZER_STATE]["state"].values():
        group.setdefault("exp_avg_sq", None)
    return state


def _dump_fragment_if_any(
    folder: str, tp_index: int, dp_index: int, name: str, tensor: Any, *where: Any
) -> None:
    if tensor is not None:  # what no rank dumps is left out of the universal form
        _dump_fragment(folder, tp_index, dp_index, name, tensor, *where)


def main() -> None:
    """Converts what the command line names."""
    multiprocessing.set_start_method("fork")  # so that the converter's own processes do the same
    DeepSpeedCheckpoint.get_zero_checkpoint_state = _state_with_both_moments
    ds_to_universal.dump_param_fragment = _dump_fragment_if_any
    ds_to_universal.main(ds_to_universal.parse_arguments())


if __name__ == "__main__":
    main()
