"""Hosts that a small program named ssh makes of this machine; each may have a fault."""

import os
import stat
from pathlib import Path

from infini_ds.config import DataConfig, TokenizerConfig
from infini_ds.data.prepare import prepare
from tests import tiny

# The program runs the command in the host's own directory, if it has one.
SSH = """#!/bin/sh
[ "$1 $2" = "-o $SSH_GIVEN" ] || { echo "ssh: wrong options: $*" >&2; exit 255; }
while [ "$1" = -o ]; do shift 2; done
host=$HOSTS/$1 command=$2
[ -d "$host" ] || { echo "ssh: Could not resolve hostname $1" >&2; exit 255; }
[ -f "$host/directory" ] && command="cd $(cat "$host/directory") && ${command#*&& }"
PYTHONPATH=$host exec sh -c "$command"
"""
GIVEN = "StrictHostKeyChecking=no"
HEALTHY = """
print("Welcome to a host!")
from infini_ds.system import network
network.meeting_address = lambda: "10.0.0.{number}"
network.route_to = lambda address: network.Route("eth0", "10.0.0.{number}", address)
"""


class Hosts:
    """A run's config, store and output_dir in a directory that all hosts share, unless told."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.shared = folder / "shared"
        (self.shared / "output").mkdir(parents=True)
        self.path = folder / "bin"
        self.path.mkdir()
        program = self.path / "ssh"
        program.write_text(SSH)
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        self.hostfile = folder / "hostfile"
        self.hostfile.touch()
        write_run(self.shared)

    def environment(self) -> dict[str, str]:
        return {
            "PATH": f"{self.path}:{os.environ['PATH']}",
            "HOSTS": str(self.folder),
            "SSH_GIVEN": GIVEN,
            "PDSH_SSH_ARGS_APPEND": f"-o {GIVEN}",
        }

    def add(self, name: str, fault: str = "", slots: int = 1) -> Path:
        """A host in the hostfile.

        Args:
            fault: Python that runs before all else on this host.
        """
        host = self.unreachable(name, slots)
        host.mkdir()
        number = len(self.hostfile.read_text().splitlines())
        (host / "sitecustomize.py").write_text(HEALTHY.format(number=number) + fault)
        return host

    def add_apart(self, name: str, *own: str) -> Path:
        """A host in a directory of its own; what is in it, but for `own`, is shared."""
        host = self.add(name)
        directory = host / "work"
        directory.mkdir()
        (host / "directory").write_text(str(directory))
        for shared in self.shared.iterdir():
            if shared.name not in own:
                (directory / shared.name).symlink_to(shared)
        return directory

    def unreachable(self, name: str, slots: int = 1) -> Path:
        """A host that is in the hostfile alone."""
        with self.hostfile.open("a") as file:
            print(name, f"slots={slots}", file=file)
        return self.folder / name


def write_run(folder: Path, text: str = "one document of a few words\n") -> None:
    """A config and its store, with paths relative to the folder."""
    (folder / "corpus.txt").write_text(text * 200)
    here = Path.cwd()
    os.chdir(folder)
    try:
        data = DataConfig(
            source="files", files=["corpus.txt"], store="store", held_out_fraction=0.0,
            tokenizer=TokenizerConfig(kind="bytes"),
        )  # fmt: skip
        prepare(data, workers=1)
    finally:
        os.chdir(here)
    tiny.write_run(
        folder / "run.yaml",
        output_dir="output",
        data=data.model_dump(),
        train={"batch_size": 2, "window_segments": 2},
    )
