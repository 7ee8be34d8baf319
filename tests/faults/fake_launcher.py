"""Acts as a launcher of a run: python fake_launcher.py OUTPUT SCENARIO.

SCENARIO is a JSON list with one entry a start: the exit code, and the step that metrics.jsonl ends
with. "forever": it runs until SIGTERM, and exits with 0, "slow" seconds after it. "orphan": it
leaves a child behind.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    output, scenario = Path(sys.argv[1]), json.loads(sys.argv[2])
    output.mkdir(exist_ok=True)
    starts = output / "starts"
    with starts.open("a") as file:
        print(os.getpid(), file=file)
    act = scenario[len(starts.read_text().split()) - 1]
    if "step" in act:
        (output / "metrics.jsonl").write_text(json.dumps({"step": act["step"]}) + "\n")
    if act.get("orphan"):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (output / "orphan").write_text(str(child.pid))
    if act.get("forever"):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(time.sleep(act.get("slow", 0))))
        (output / "ready").touch()
        while True:
            time.sleep(0.1)
    return act["code"]


if __name__ == "__main__":
    sys.exit(main())
