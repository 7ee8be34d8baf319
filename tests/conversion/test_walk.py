"""The way from Hugging Face and back can be typed as docs/conversion.md shows it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.processes import free_port

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_way_from_hugging_face_and_back_runs_as_shown(tmp_path):
    page = (ROOT / "docs" / "conversion.md").read_text()
    section = page.split("# From Hugging Face and back\n")[1]
    _, walk = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)[:2]
    for name in ("docs", "launch"):
        shutil.copytree(ROOT / name, tmp_path / name)
    walk = walk.replace("deepspeed ", f"deepspeed --master_port {free_port()} ")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        ["bash", "-euc", walk],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=550, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "starting from exports/tiny" in done.stdout
    assert "2 pipeline stages x 1 data-parallel" in done.stdout
    assert "step 5: saved runs/tiny/checkpoints/step_00000005" in done.stdout
    assert len(done.stdout.splitlines()[-1]) > 10, "what transformers wrote"
