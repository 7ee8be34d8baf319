"""One rank that starts from an export and saves: python start_worker.py CONFIG FOLDER.

It tells the most memory that it has taken until it has the weights, and until it has saved them.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from infini_ds.config import load
from infini_ds.parallel.build import build_engine, start_distributed
from infini_ds.runs.export import open_model
from infini_ds.system.resources import give_blocks_their_own_pages
from infini_ds.training.start import load_start


def peak() -> int:
    """Bytes."""
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    give_blocks_their_own_pages()
    torch.set_num_threads(1)
    config = load(sys.argv[1])
    start_distributed(60)
    engine = build_engine(config)
    load_start(engine, open_model(Path(config.init_from)).weights)
    taken = peak()
    if dist.get_rank() == 0:
        Path(sys.argv[2]).mkdir()
    dist.barrier()
    engine.save_states(Path(sys.argv[2]), 0)
    print("peaks", taken, peak(), flush=True)
