"""The scripts to start things: whatever environment is activated, and whatever a run is named."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.config.test_config import TREE

ROOT = Path(__file__).parents[1]
PROGRAM = """#!/bin/sh
# Stands for the programs of an environment: says what it was told.
echo "$(basename "$0") $*"
"""


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The scripts, in a directory of an odd name, beside a python3 that has nothing."""
    folder = tmp_path / "a [1] $x"
    for name in ("launch", "tokenizer"):
        shutil.copytree(ROOT / name, folder / name)
    program(tmp_path / "bin" / "python3", "#!/bin/sh\nexit 1\n")
    return folder


def start(checkout: Path, *command: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {"PATH": f"{checkout.parent}/bin:/usr/bin:/bin", **variables}
    return subprocess.run(
        command, cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )


SCRIPTS = {
    "pretrain": ("launch/pretrain.sh", "python3 -m infini_ds.cluster.supervisor"),
    "train": ("tokenizer/train.sh", "python3 -m infini_ds.data.train_tokenizer"),
}


@pytest.mark.parametrize(("script", "runs"), SCRIPTS.values(), ids=SCRIPTS)
class TestWithoutAnActivatedEnvironment:
    def test_that_of_the_checkout_is_taken(self, checkout, script, runs):
        for name in ("python3", "infini-ds"):
            program(checkout / ".venv" / "bin" / name, PROGRAM)
        done = start(checkout, "bash", script, "a b", "$c")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(runs)
        assert done.stdout.endswith("a b $c\n")

    def test_one_line_says_what_to_do(self, checkout, script, runs):
        done = start(checkout, "bash", script, "a", "b")
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"infini-ds: {checkout.parent}/bin/python3 has no infini_ds, and")
        assert f"{checkout}/.venv; activate the environment that has it" in line


def test_any_shell_starts_a_run(checkout):
    for name in ("python3", "infini-ds"):
        program(checkout / ".venv" / "bin" / name, PROGRAM)
    assert start(checkout, "sh", "launch/pretrain.sh", "run.yaml").returncode == 0


def test_launcher_of_another_environment_is_told(checkout):
    command = [sys.executable, "-I", "-S", "launch/pretrain.sh", "run.yaml"]
    done = start(checkout, *command)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"infini-ds: {sys.executable}, which was told to run {checkout}/launch")
    assert "has no infini_ds; " in line
    assert "activate the environment that has it" in line


def test_job_without_an_environment_is_told(checkout):
    done = start(checkout, "bash", "launch/pretrain.sbatch", "run.yaml")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"infini-ds: not on PATH, nor in {checkout}/.venv; activate")


SLURM = {
    "scontrol": '#!/bin/sh\n[ "$2" = job ] && echo " JobState=RUNNING " || echo node-1\n',
    "srun": '#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; done\nexec "$@"\n',
    # A checkpoint, a report, and what it was told.
    "infini-ds": """#!/bin/bash
echo "told $*"
[[ $1 == pretrain ]] || exit 0
output=$(ls -d "$PWD"/*layers*)
mkdir -p "$output/checkpoints/step_00000007"
touch "$output/checkpoints/step_00000007/manifest.json"
[[ $MADE == all ]] && echo '{"step": 10}' > "$output/report.json"
exit 1
""",
}


NAMES = [
    "layers=[1,2]", " layers  ", "layers%t%j", r"layers\n\%t", "-layers", "layers*?{a,b}",
    "layers $5 `a` $$", "layers'\"", "layers;&|<>#!", "../here/layers", "Länge_layers_🙂",
    "./layers/",
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "made", "said"),
    [*((name, "some", "at step 7: queued again") for name in NAMES),
     (NAMES[0], "all", "finished at step 10")],
)  # fmt: skip
def test_job_finds_a_run_of_any_name(tmp_path, name, made, said):
    """On stand-ins for Slurm: where it writes, and whether it has made a checkpoint."""
    for stand_in, text in SLURM.items():
        program(tmp_path / "bin" / stand_in, text)
    here = tmp_path / "here"
    here.mkdir()
    (here / "run.yaml").write_text(yaml.safe_dump({**TREE, "output_dir": name}))
    variables = {"SLURM_JOB_ID": "5", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_GTIDS": "0"}
    variables |= {"SLURM_JOB_NODELIST": "node-1", "SLURM_LOCALID": "0", "MADE": made}
    path = os.pathsep.join(
        [f"{tmp_path}/bin", str(Path(sys.executable).parent), os.environ["PATH"]]
    )
    arguments = ["run.yaml", "evaluation.sample_prompt=$b  c"]
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "pretrain.sbatch"), *arguments], cwd=here,
        env={**os.environ, **variables, "PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert said in done.stdout, done.stdout
    log = here / name / "logs" / "rank_0.log"
    assert log.read_text() == "told pretrain run.yaml evaluation.sample_prompt=$b  c\n"
