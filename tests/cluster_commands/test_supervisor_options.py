"""The options of `bash launch/pretrain.sh`: a mistake is told before anything is started."""

import pytest

from infini_ds.cluster import supervisor
from tests.config.test_config import CONFIGS


def test_only_the_config_is_required(capsys):
    with pytest.raises(SystemExit) as ended:
        supervisor.main(["launch/pretrain.sh"])
    assert ended.value.code == 2
    assert "are required: CONFIG\n" in capsys.readouterr().err


def test_number_of_restarts_is_checked(capsys):
    assert supervisor.main(["launch/pretrain.sh", "--max-restarts=-1", str(CONFIGS[0])]) == 2
    assert capsys.readouterr().err == "infini-ds: --max-restarts (-1) must be at least 0\n"


def test_launchers_options_that_cannot_be_split_are_named(capsys):
    assert supervisor.main(["launch/pretrain.sh", "--deepspeed", "'", str(CONFIGS[0])]) == 2
    assert capsys.readouterr().err == "infini-ds: --deepspeed ('): no closing quotation\n"
