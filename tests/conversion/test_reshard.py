"""A checkpoint readied for another layout; only a whole one that can be resumed in one."""

import shutil

import pytest

from infini_ds import cli
from tests.damage import flip
from tests.evaluation.conftest import run  # noqa: F401, a fixture
from tests.tiny_run import tiny_config, write_checkpoint


def reshard(path, *options) -> int:
    return cli.main(["convert", "reshard", str(path), *options])


@pytest.mark.slow
def test_is_made_once_beside_the_checkpoint(run, capsys):  # noqa: F811
    universal = run.resolve() / "checkpoints" / "universal_step_00000001"
    assert reshard(run, "--step", "1") == 0
    assert f"{universal}: resume with any number of processes" in capsys.readouterr().out
    states = universal / "zero"
    assert states.is_dir()
    assert (universal / "manifest.json").is_file()
    shutil.rmtree(states)
    assert reshard(run, "--step", "1") == 0
    assert not states.exists(), "a finished one is not made again"


def test_damaged_checkpoint_is_refused(run, capsys):  # noqa: F811
    checkpoint = run / "checkpoints" / "step_00000002"
    file = next(checkpoint.glob("*optim_states.pt"))
    flip(file)
    assert reshard(run) == 2
    assert f"{file.name} does not have its checksum" in capsys.readouterr().err
    assert not list(run.glob("checkpoints/universal*"))


def test_fp32_without_zero_is_refused(tmp_path, capsys):
    config = tiny_config(tmp_path)
    parallel = config.parallel.model_copy(update={"zero_stage": 0})
    write_checkpoint(config.model_copy(update={"parallel": parallel}))
    assert reshard(tmp_path) == 2
    assert "can only be resumed in its own layout" in capsys.readouterr().err
