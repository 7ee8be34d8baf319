"""One rank that tells how much memory it takes.

python held_worker.py CONFIG           what it holds between two training steps
python held_worker.py CONFIG FOLDER    the most that it has taken until it has the weights of
                                       init_from, and until it has saved them
"""

import gc
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from infini_ds.benchmarks.ranks import random_windows
from infini_ds.config import RunConfig, load
from infini_ds.parallel.build import build_engine, start_distributed
from infini_ds.parallel.engine import StepSize
from infini_ds.parallel.pipeline.engine import InfiniEngine
from infini_ds.runs.export import open_model
from infini_ds.system.resources import give_blocks_their_own_pages, memory_taken
from infini_ds.training.start import load_start


def train(engine: InfiniEngine, config: RunConfig) -> None:
    lanes = map(engine.lanes_of, range(engine.layout.micro_batches))
    windows = [random_windows(config, 0, own) for own in lanes]
    size = StepSize(config.step_tokens, config.step_tokens)
    for _ in range(2):
        engine.train_step(lambda micro_batch: windows[micro_batch], size, 1.0)
    gc.collect()
    print("held", memory_taken("VmRSS"), flush=True)


def start_and_save(engine: InfiniEngine, config: RunConfig, folder: Path) -> None:
    load_start(engine, open_model(Path(config.init_from)).weights)
    taken = memory_taken("VmHWM")
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    engine.save_states(folder, 0)
    print("peaks", taken, memory_taken("VmHWM"), flush=True)


if __name__ == "__main__":
    give_blocks_their_own_pages()
    torch.set_num_threads(1)
    settings = load(sys.argv[1])
    start_distributed(60)
    built = build_engine(settings)
    if len(sys.argv) == 2:
        train(built, settings)
    else:
        start_and_save(built, settings, Path(sys.argv[2]))
