"""Arguments are checked where they are declared, whatever argparse would say of a mistake."""

import argparse

import pytest

from infini_ds.errors import UserError
from infini_ds.system.arguments import Checked, at_least
from infini_ds.system.paths import argument


def even(name: str, value: int) -> int:
    if value % 2:
        raise UserError(f"{name} ({value}) must be even")
    return value // 2


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("first", type=int, nargs="?", action=Checked, check=even)
    parser.add_argument("-s", "--several-halves", type=int, nargs="+", action=Checked, check=even)
    parser.add_argument("--most", type=int, default=7, action=Checked, check=at_least(1))
    return parser


def test_what_is_meant_is_stored(parser):
    options = parser.parse_args(["4", "-s", "2", "6", "--most=1"])
    assert (options.first, options.several_halves, options.most) == (2, [1, 3], 1)


def test_what_is_left_out_is_not_checked(parser):
    options = parser.parse_args([])
    assert (options.first, options.several_halves, options.most) == (None, None, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["3"], "first (3) must be even"),
        (["-s", "2", "3"], "--several-halves (3) must be even"),
        (["--several=3"], "--several-halves (3) must be even"),
        (["--most=0"], "--most (0) must be at least 1"),
    ],
    ids=" ".join,
)
def test_mistake_has_the_name_of_the_argument(parser, arguments, message):
    with pytest.raises(UserError) as caught:
        parser.parse_args(arguments)
    assert str(caught.value) == message


def test_what_type_refuses_is_told_by_argparse(parser, capsys):
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--most=few"])
    assert ended.value.code == 2
    assert "argument --most: invalid int value: 'few'" in capsys.readouterr().err


def test_arguments_may_be_mixed():
    """As `bash launch/pretrain.sh` takes them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config", action=Checked, check=argument)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--most", type=int, action=Checked, check=at_least(1))
    options = parser.parse_intermixed_args(["run.yaml", "a=1", "--most", "3", "b=2"])
    assert vars(options) == {"config": "run.yaml", "overrides": ["a=1", "b=2"], "most": 3}
