"""Converts a model and says how much memory that took.

    python memory_worker.py FOLDER

FOLDER/plain, a Llama checkpoint, becomes an export and then a Llama checkpoint again. Before
that FOLDER/tiny does, so that all code is loaded that is needed.
"""

import sys
from pathlib import Path

import torch

from infini_ds.conversion import convert


def memory(kind: str) -> int:
    """Bytes: VmRSS now, or VmHWM at most so far. Unlike ru_maxrss, not that of the parent."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind):
            return int(line.split()[1]) * 1024
    raise AssertionError(kind)


def main(folder: Path) -> None:
    there_and_back(folder, "tiny")
    before = memory("VmRSS")
    there_and_back(folder, "plain")
    print(f"peak {memory('VmHWM') - before}")


def there_and_back(folder: Path, name: str) -> None:
    paths = [folder / name, folder / f"{name}_export", folder / f"{name}_back"]
    convert.from_llama(convert.Task(*paths[:2], shard_bytes=16_000_000), 32, -4.0, "linear")
    convert.to_llama(convert.Task(*paths[1:], shard_bytes=16_000_000))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
