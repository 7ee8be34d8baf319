"""One rank that tells what it holds between two training steps: python held_worker.py CONFIG."""

import gc
import sys

import torch

from infini_ds.benchmarks.ranks import random_windows
from infini_ds.config import load
from infini_ds.parallel.build import build_engine, start_distributed
from infini_ds.parallel.engine import StepSize
from infini_ds.system.resources import give_blocks_their_own_pages

if __name__ == "__main__":
    give_blocks_their_own_pages()
    torch.set_num_threads(1)
    config = load(sys.argv[1])
    start_distributed(60)
    engine = build_engine(config)
    lanes = map(engine.lanes_of, range(engine.layout.micro_batches))
    windows = [random_windows(config, 0, own) for own in lanes]
    size = StepSize(config.step_tokens, config.step_tokens)
    for _ in range(2):
        engine.train_step(lambda micro_batch: windows[micro_batch], size, 1.0)
    gc.collect()
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith("VmRSS"))
    print("held", int(line.split()[1]) * 1024, flush=True)
