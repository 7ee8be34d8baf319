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


@pytest.mark.parametrize(
    ("content", "hosts"),
    [
        (b"node-1 slots=8\r\n\r\nnode-2 slots=4\r\n", {"node-1": 8, "node-2": 4}),
        (b"node-1 slots=8\rnode-2 slots=4", {"node-1": 8, "node-2": 4}),
        (b"\n\n  # node-0 slots=1\nnode-1\tslots=8  \n", {"node-1": 8}),
        (b"node-1 slots=8#one\n", {"node-1": 8}),
        (b"10.0.0.1 slots=1\n::1 slots=2\n", {"10.0.0.1": 1, "::1": 2}),
        (b"me@node_1.example.org slots=1\n", {"me@node_1.example.org": 1}),
        ("# Länge\nnode-1 slots=1\n".encode(), {"node-1": 1}),
    ],
    ids=["crlf", "cr", "blank", "comment", "addresses", "user", "other_letters"],
)
def test_hosts_are_read_as_people_write_them(tmp_path, content, hosts):
    path = tmp_path / "hosts"
    path.write_bytes(content)
    assert read_hostfile(path) == hosts


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
        (b"\xe9 slots=1\n", "is not text"),
        (b"\xff\xfe", "begins with a byte order mark"),
        ("node-1 slots=8\n".encode("utf-8-sig"), "begins with a byte order mark"),
        ("node-1 slots=8\n".encode("utf-16"), "begins with a byte order mark"),
        ("\ufeffnode-1 slots=8\n".encode("utf-16-be"), "begins with a byte order mark"),
        ("# node\n\ufeffnode-1 slots=8\n".encode(), "line 2: '\\ufeffnode-1 slots=8' must be"),
        (b"node-1\r\n", "line 1: 'node-1' must be HOST slots=N"),
        (b"node-1 slots=\n", "line 1: 'node-1 slots=' must be HOST slots=N"),
        (b"node-1 slots = 8\n", "line 1: 'node-1 slots = 8' must be HOST slots=N"),
        (b"node-1 max_slots=8\n", "line 1: 'node-1 max_slots=8' must be"),
        (b"node[1-2] slots=8\n", "line 1: 'node[1-2] slots=8' must be"),
        (b"node-1,node-2 slots=8\n", "line 1: 'node-1,node-2 slots=8' must be"),
        (b"$HOST slots=8\n", "line 1: '$HOST slots=8' must be"),
        (b"a;b slots=8\n", "line 1: 'a;b slots=8' must be"),
        (b"%h slots=8\n", "line 1: '%h slots=8' must be"),
        ("nöde slots=8\n".encode(), "line 1: 'nöde slots=8' must be"),
        (b"node-1 slots=8\x0cnode-2 slots=8\n", "line 1: 'node-1 slots=8"),
        (b"node-1 slots=8\r\nnode-1 slots=8\r\n", "line 2: node-1 is named twice"),
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
