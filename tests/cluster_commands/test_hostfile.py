"""The hostfile as DeepSpeed reads it; what it would trip over is told with the line's number."""

import subprocess
import sys
from pathlib import Path

import pytest

from infini_ds.cluster.hostfile import read_hostfile
from infini_ds.errors import UserError

EXAMPLE = Path(__file__).parents[2] / "launch" / "hostfile.example"


def test_hosts_come_in_order_without_comments_and_blank_lines(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# a cluster\n\n  user@node-2   slots=8\nnode-1\tslots=12 # the large one\n")
    assert list(read_hostfile(path).items()) == [("user@node-2", 8), ("node-1", 12)]


def test_the_example_is_one():
    assert read_hostfile(EXAMPLE) == {"node-1": 8, "node-2": 8}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "names no host"),
        (b"# node-1 slots=8\n\n", "names no host"),
        (b"node-1 slots=8\n\nnode-2\n", "line 3: 'node-2' must be HOST slots=N"),
        (b"node-1 slots=0\n", "line 1: 'node-1 slots=0' must be"),
        (b"node-1 slots=8x\n", "line 1: 'node-1 slots=8x' must be"),
        (b"node-1 slots=8 node-2 slots=8\n", "line 1: 'node-1 slots=8 node-2 slots=8' must be"),
        (b"-oProxyCommand=true slots=1\n", "line 1: '-oProxyCommand=true slots=1' must be"),
        (b"node-1 slots=8\n# \nnode-1 slots=4\n", "line 3: node-1 is named twice"),
        (b"\xff\xfe", "is not text"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_mistake_is_told_with_its_line(tmp_path, content, message):
    path = tmp_path / "hosts"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_hostfile(path)
    assert str(error.value).startswith(f"hostfile {path}")
    assert message in str(error.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none: cannot be read \(No such file"):
        read_hostfile(tmp_path / "none")


def test_it_needs_neither_torch_nor_deepspeed():
    code = (
        "import sys, infini_ds.cluster.hostfile; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'deepspeed')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
