"""python worker.py FAULTS CONFIG ...: `infini-ds pretrain` with faults.

FAULTS is a JSON object; steps count from 0:
    "nan": steps whose windows give a loss that is not a number;
    "skip": steps whose windows are not read, from the start;
    "unchecked": the store is opened without comparing checksums, as a large one is;
    "exchange": [CALL, RANK, SIGNAL, STEP]: a rank gets a signal in its first call of that method of
        ContextGroup in a step.
"""

import json
import math
import os
import sys

import torch.distributed as dist

from infini_ds.cli import main
from infini_ds.data import store
from infini_ds.parallel.context import ContextGroup
from infini_ds.training.trainer import Trainer

FAULTS = json.loads(sys.argv[1])


class FaultyTrainer(Trainer):
    """The trainer, with faults."""

    def run(self):
        self.bad_steps.skip |= set(FAULTS.get("skip", []))
        super().run()

    def _reader(self, plan):
        if "exchange" in FAULTS and self.step == FAULTS["exchange"][3]:
            disturb_exchange(*FAULTS["exchange"][:3])
        read = super()._reader(plan)
        bad = self.step in FAULTS.get("nan", [])

        def faulty(micro_batch):
            windows = read(micro_batch)
            if bad:
                windows.weights.fill_(math.nan)
            return windows

        return faulty


def disturb_exchange(call: str, lost: int, number: int) -> None:
    exchange = getattr(ContextGroup, call)

    def disturbed(self, tensor):
        if dist.get_rank() == lost:
            os.kill(os.getpid(), number)
        return exchange(self, tensor)

    setattr(ContextGroup, call, disturbed)


if __name__ == "__main__":
    from infini_ds.training import trainer

    trainer.Trainer = FaultyTrainer
    if FAULTS.get("unchecked"):
        store._CHECKED_ON_OPEN = 0
    sys.exit(main(["pretrain", *sys.argv[2:]]))
