"""python hang_worker.py MODE OUTPUT: one rank under a watchdog with a limit of a second."""

import ctypes
import os
import sys
import time

from infini_ds import config as configuration
from infini_ds.guard.watchdog import Watchdog
from infini_ds.parallel.build import start_distributed


def hang(keep_the_lock: bool) -> None:
    library = ctypes.PyDLL(None) if keep_the_lock else ctypes.CDLL(None)
    library.sleep(600)


def main() -> None:
    mode, output = sys.argv[1:]
    tree = {
        "output_dir": output,
        "model": {"num_layers": 1, "hidden_size": 8, "num_heads": 1},
        "data": {"store": "unused"},
        "train": {"steps": 1, "batch_size": 1, "hang_timeout": 1.0, "timeout": 4.0},
    }
    start_distributed(60)
    watchdog = Watchdog(configuration.parse(tree, "here"))
    time.sleep(2)  # before the first step nothing is too slow
    watchdog.step_done(3)
    for _ in range(5):
        time.sleep(0.5)
        watchdog.progress("the test's work")
    if mode == "works":
        with watchdog.patient():
            time.sleep(2.5)
        watchdog.stop()
        time.sleep(2)
        os._exit(0)
    if mode == "sleeps_patiently":
        with watchdog.patient():
            hang(False)
    hang(mode == "keeps_the_lock")


if __name__ == "__main__":
    main()
