"""The wheel, installed where there is no checkout."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from infini_ds.system import shipped

ROOT = Path(__file__).parents[2]
SMALL = [
    "data.source=files", "data.files=[a.txt]", "data.store=store", "data.tokenizer={kind: bytes}",
    "data.held_out_fraction=0.0", "model.hidden_size=16", "model.head_dim=8",
    "model.intermediate_size=16", "train.dtype=fp32", "evaluation.sample_tokens=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """An environment with the wheel, and with our packages beside it but for infini_ds itself."""
    folder = tmp_path_factory.mktemp("wheel")
    python = folder / "environment" / "bin" / "python3"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run(wheel, check=True, timeout=120)
    make = [sys.executable, "-m", "venv", "--without-pip", str(folder / "environment")]
    subprocess.run(make, check=True, timeout=120)
    (file,) = folder.glob("*.whl")
    install = [*pip, "--python", str(python), "install", "--no-deps", str(file)]
    subprocess.run(install, check=True, timeout=120)
    (site,) = folder.glob("environment/lib/python*/site-packages")
    # A path in a .pth file brings the packages in a folder, but not what its own .pth files name.
    (site / "others.pth").write_text(sysconfig.get_paths()["purelib"])
    return folder / "environment"


def run(installed: Path, folder: Path, *command: str) -> str:
    environment = {
        "PATH": f"{installed / 'bin'}:/usr/bin:/bin", "HOME": str(folder), "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_configs_and_launchers_are_in_it(installed, tmp_path):
    where = "import infini_ds; print(infini_ds.__file__)"
    assert str(installed) in run(installed, tmp_path, "python3", "-c", where)
    shown = run(installed, tmp_path, "infini-ds", "configs")
    for name, path in shipped.configs().items():
        assert name in shown
        kept = installed / "share" / "infini_ds" / "configs" / path.name
        assert kept.read_bytes() == path.read_bytes()
    for launcher in ("pretrain.sh", "pretrain.sbatch"):
        assert str(installed / "share" / "infini_ds" / "launch" / launcher) in shown


def test_a_shipped_config_trains_and_is_exported(installed, tmp_path):
    (tmp_path / "a.txt").write_text("a memory of all segments\n" * 200)
    run(installed, tmp_path, "infini-ds", "prepare", "quickstart", *SMALL)
    one = [*SMALL, "parallel.pipeline_stages=1"]
    run(installed, tmp_path, "infini-ds", "pretrain", "quickstart", *one, "train.steps=1")
    script = str(installed / "share" / "infini_ds" / "launch" / "pretrain.sh")
    shown = run(installed, tmp_path, "python3", script, "quickstart", *one, "train.steps=2")
    assert "resumed from runs/quickstart/checkpoints/step_00000001" in shown
    run(installed, tmp_path, "infini-ds", "convert", "to-hf", "runs/quickstart", "export")
    assert (tmp_path / "export" / "modeling_infini.py").is_file()


def test_a_name_is_a_path_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped.config(Path("quickstart")) == ROOT / "configs" / "quickstart.yaml"
    (tmp_path / "quickstart").write_text("")
    assert shipped.config(Path("quickstart")) == Path("quickstart")
    for other in ("quickstart.yaml", "a/quickstart", "unknown"):
        assert shipped.config(Path(other)) == Path(other)


@pytest.mark.parametrize("name", shipped.configs())
def test_every_config_says_in_a_sentence_what_it_is(name):
    text = shipped.about(shipped.configs()[name])
    assert 20 < len(text) < 200
    assert not text.endswith((".", ":", ","))
