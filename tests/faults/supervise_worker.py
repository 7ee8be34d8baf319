"""python supervise_worker.py OUTPUT MAX_RESTARTS SCENARIO: supervises the fake launcher."""

import signal
import sys
from pathlib import Path

from infini_ds.cluster import supervisor

FAKE = Path(__file__).with_name("fake_launcher.py")

if __name__ == "__main__":
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests may have been started with nohup
    output, restarts, scenario = sys.argv[1:]
    supervisor.END_SECONDS = 1.0
    command = [sys.executable, str(FAKE), output, scenario]
    sys.exit(supervisor.supervise(command, Path(output), int(restarts), first_delay=0.05))
