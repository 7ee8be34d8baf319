"""The files that containers are made of, checked without a daemon that builds them."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "containers").glob("*.Dockerfile"))


def copied(path: Path) -> list[tuple[str, str]]:
    """What a Dockerfile takes from the checkout, and where it puts it."""
    lines = re.findall(r"^COPY (.*)$", path.read_text(), re.MULTILINE)
    pairs = []
    for line in lines:
        *sources, target = line.split()
        pairs += [(source, target) for source in sources]
    return pairs


def test_there_is_one_for_each_kind_of_machine():
    assert [path.name for path in FILES] == ["cpu.Dockerfile", "cuda.Dockerfile"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_hadolint_finds_nothing(path):
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, path], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_it_copies_is_all_that_a_wheel_needs(path, tmp_path):
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[0] == "*"
    for source, target in copied(path):
        assert f"!{source}" in ignored
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, tmp_path / "context" / target)
        else:
            (tmp_path / "context" / target).mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / source, tmp_path / "context" / target)
    command = [
        sys.executable, "-m", "pip", "--quiet", "wheel", str(tmp_path / "context"), "--no-deps",
        "--no-build-isolation", "-w", str(tmp_path),
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("infini_ds/cli.py", "share/infini_ds/configs/quickstart.yaml", "pretrain.sbatch"):
        assert any(each.endswith(name) for each in names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_has_the_torch_that_is_tested(path):
    (tested,) = re.findall(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    (taken,) = re.findall(r"torch==([\d.]+)", path.read_text())
    assert taken == tested


def test_the_devcontainer_is_built_from_one_of_them():
    tree = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    build = tree["build"]
    assert (ROOT / ".devcontainer" / build["dockerfile"]).resolve() in FILES
    assert (ROOT / ".devcontainer" / build["context"]).resolve() == ROOT
