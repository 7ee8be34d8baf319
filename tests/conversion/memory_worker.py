"""Converts a model and says how much memory that took.

    python memory_worker.py FOLDER KIND

FOLDER/plain, a Llama checkpoint, becomes an export and then a Llama checkpoint again (KIND is
llama); or FOLDER/plain, a run's checkpoint, is exported for transformers, in the dtype of KIND.
Before that FOLDER/tiny is, so that all code is loaded that is needed.
"""

import sys
from pathlib import Path

import torch

from infini_ds.conversion import convert
from infini_ds.system.resources import memory_taken


def main(folder: Path, kind: str) -> None:
    convert_it(folder, "tiny", kind)
    before = memory_taken("VmRSS")
    convert_it(folder, "plain", kind)
    print(f"peak {memory_taken('VmHWM') - before}")


def convert_it(folder: Path, name: str, kind: str) -> None:
    if kind == "llama":
        there_and_back(folder, name)
    else:
        source, target = folder / name / "step_00000001", folder / f"{name}_{kind}"
        convert.to_hf(convert.Task(source, target, shard_bytes=16_000_000), kind)


def there_and_back(folder: Path, name: str) -> None:
    plain, export, back = folder / name, folder / f"{name}_export", folder / f"{name}_back"
    inward = convert.Task(plain, export, shard_bytes=16_000_000, without_tokenizer=True)
    convert.from_llama(inward, 32, -4.0, "linear")
    convert.to_llama(convert.Task(export, back, shard_bytes=16_000_000, without_tokenizer=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2])
