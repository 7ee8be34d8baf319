"""What is to go with ssh to the hosts is told where it cannot be read."""

import os
import subprocess

import pytest

from infini_ds.cluster import way
from infini_ds.errors import UserError


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setattr(way, "_require", lambda program: None)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("line", "value"),
    [("COLOUR=light blue", "light blue"), ("COLOUR=$HOME/a", "/there/a"), ("COLOUR=a=b", "a=b"),
     ("COLOUR=it's", "it's"), ("COLOUR= a ", "a"), ("COLOUR=", "")],
)  # fmt: skip
def test_variables_of_deepspeeds_file_go_along(tmp_path, line, value):
    """With the values that DeepSpeed's launcher gives them, which leaves `$` to the other host."""
    (tmp_path / ".deepspeed_env").write_text(f"{line}\n")
    there, _, _ = way.over_ssh("node-1").command[-1].rpartition("exec ")
    command = ["bash", "-c", f'{there} printf "%s" "$COLOUR"']
    environment = {"HOME": "/there", "PATH": os.environ["PATH"]}
    assert subprocess.check_output(command, env=environment, text=True) == value


@pytest.mark.parametrize(
    "line",
    ["", "nothing", "# a comment", "=1", "export A=1", "A B=1", "- A=1", "A: 1", "A.B=1", " A=1"],
)
def test_line_that_ends_deepspeeds_launcher_is_named(tmp_path, line):
    path = tmp_path / ".deepspeed_env"
    path.write_text(f"COLOUR=blue\n{line}\n")
    with pytest.raises(UserError) as caught:
        way.over_ssh("node-1")
    assert str(caught.value).startswith(f"{path} line 2: {line!r} must be NAME=VALUE")


def test_file_of_variables_that_is_not_text_is_named(tmp_path):
    path = tmp_path / ".deepspeed_env"
    path.write_bytes(b"\xff\xfe=1\n")
    with pytest.raises(UserError) as caught:
        way.over_ssh("node-1")
    assert str(caught.value) == f"{path}: cannot be read (not text)"


def test_options_of_ssh_that_cannot_be_split_are_named(monkeypatch):
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-o 'A")
    with pytest.raises(UserError, match=r"^PDSH_SSH_ARGS_APPEND \(-o 'A\): no closing quotation$"):
        way.over_ssh("node-1")
