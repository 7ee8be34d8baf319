"""python worker.py FAULTS CONFIG ...: `infini-ds pretrain` with faults.

FAULTS is a JSON object; steps count from 0:
    "nan": steps whose windows give a loss that is not a number;
    "skip": steps whose windows are not read, from the start;
    "unchecked": the store is opened without comparing checksums, as a large one is.
"""

import json
import math
import sys

from infini_ds.cli import main
from infini_ds.data import store
from infini_ds.training.trainer import Trainer

FAULTS = json.loads(sys.argv[1])


class FaultyTrainer(Trainer):
    """The trainer, with faults."""

    def run(self):
        self.bad_steps.skip |= set(FAULTS.get("skip", []))
        super().run()

    def _reader(self, plan):
        read = super()._reader(plan)
        bad = self.step in FAULTS.get("nan", [])

        def faulty(micro_batch):
            windows = read(micro_batch)
            if bad:
                windows.weights.fill_(math.nan)
            return windows

        return faulty


if __name__ == "__main__":
    from infini_ds.training import trainer

    trainer.Trainer = FaultyTrainer
    if FAULTS.get("unchecked"):
        store._CHECKED_ON_OPEN = 0
    sys.exit(main(["pretrain", *sys.argv[2:]]))
