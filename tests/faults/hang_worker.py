"""python hang_worker.py MODE CONFIG: one rank under a watchdog."""

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
    mode, config = sys.argv[1:]
    start_distributed(60)
    watchdog = Watchdog(configuration.load(config))
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
