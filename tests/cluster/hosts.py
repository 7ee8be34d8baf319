"""Hosts of a cluster as namespaces of this machine: network, processes, mounts and host name.

They share the file system, as the nodes of most clusters share one, and each has an sshd. The
namespaces have no names: the kernel takes all of them down with the process that made them,
however that one ends.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.distributed.processes import Process

NETWORK = "10.42.0"
PROGRAMS = {
    "ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux",
    "setpriv": "util-linux", "sshd": "openssh-server", "ssh": "openssh-client",
    "ssh-keygen": "openssh-client", "pdsh": "pdsh", "pkill": "procps", "hostname": "hostname",
}  # fmt: skip
"""Programs that the hosts need, and Debian's packages of them."""
START_SECONDS = 120.0
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def missing(programs: dict[str, str]) -> str:
    """Why this machine cannot have such hosts; empty if it can."""
    if os.geteuid() != 0:
        return "needs root"
    packages = {package for name, package in programs.items() if not shutil.which(name)}
    if packages:
        return f"needs the packages {' '.join(sorted(packages))}"
    attempt = ["unshare", "--net", "--pid", "--mount", "--uts", "--fork", "true"]
    allowed = subprocess.run(attempt, capture_output=True, check=False).returncode == 0
    return "" if allowed else "needs the right to make namespaces (a privileged container)"


class Host:
    """One of them; `pid` is that of its sshd, its first process."""

    def __init__(self, name: str, address: str, home: Path, setup: str):
        self.name, self.address, self.home = name, address, home
        script = f"set -e; hostname {name}; {setup}"
        flags = ["--net", "--uts", "--mount", "--mount-proc"]
        self._anchor, self.pid = _unshare(flags, ["bash", "-c", script])

    def command(self, *command: str, cwd: Path | None = None) -> list[str]:
        """What to type on this machine to run a command on that host, as a login there would."""
        programs = f"{Path(sys.executable).parent}:{SYSTEM_PATH}"
        environment = [f"HOME={self.home}", f"PATH={programs}", "DS_ACCELERATOR=cpu"]
        if "PYTHONPATH" in os.environ:  # a checkout that is not the one which is installed
            environment.append(f"PYTHONPATH={os.environ['PYTHONPATH']}")
        enter = ["nsenter", "-t", str(self.pid), "-n", "-p", "-m", "-u", f"--wdns={cwd or '/'}"]
        return [*enter, "--", "env", "-i", *environment, *command]

    def run(self, *command: str, cwd: Path | None = None, check: bool = True) -> str:
        """Runs a short command there; its output.

        Args:
            check: whether it must succeed.
        """
        entered = self.command(*command, cwd=cwd)
        done = subprocess.run(entered, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0 or not check, (
            f"{shlex.join(command)}: {done.stdout}{done.stderr}"
        )
        return done.stdout

    def start(self, *command: str, log: Path, cwd: Path | None = None) -> Process:
        """Starts a command there."""
        return Process(self.command(*command, cwd=cwd), log, {}, None)

    def processes(self, text: str = "") -> dict[int, str]:
        """Command lines of its processes, this machine's ids first, without the sshd itself.

        Args:
            text: what the command lines contain.
        """
        space = os.readlink(f"/proc/{self.pid}/ns/pid")
        found: dict[int, str] = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if not entry.name.isdigit() or os.readlink(entry / "ns/pid") != space:
                    continue
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                # What has ended, and only waits for its parent, has no command line.
                if line and text in line and int(entry.name) != self.pid:
                    found[int(entry.name)] = line
        return found

    def send(self, text: str, number: signal.Signals) -> None:
        """Signals its processes whose command line contains a text."""
        found = self.processes(text)
        assert found, f"{self.name}: no process {text!r} among {self.processes()}"
        for pid in found:
            os.kill(pid, number)

    def end(self) -> None:
        self._anchor.kill()
        self._anchor.wait()


class Hosts:
    """Hosts on one switch. A context manager."""

    def __init__(self, names: Sequence[str], folder: Path):
        """Brings them up.

        Args:
            folder: for their files; the home directory of root on all of them is made there.
        """
        self.folder, self.home = folder, folder / "home"
        self.all: list[Host] = []
        self._switch, self._switch_pid = _unshare(["--net"], ["sleep", "infinity"])
        try:
            self._write_files(names)
            self._in_switch("link", "add", "switch", "type", "bridge", "stp_state", "0")
            self._in_switch("link", "set", "switch", "up")
            for number, name in enumerate(names, 1):
                self._add(name, f"{NETWORK}.{number}")
            for host in self.all:
                self._wait_for_ssh(host)
        except BaseException:
            self.end()
            raise

    def __enter__(self) -> "Hosts":
        return self

    def __exit__(self, *_) -> None:
        self.end()

    def __getitem__(self, index: int) -> Host:
        return self.all[index]

    def end(self) -> None:
        """Takes all down."""
        for host in self.all:
            host.end()
        self._switch.kill()
        self._switch.wait()

    def hostfile(self, count: int) -> Path:
        """A hostfile of the first hosts, with one device each."""
        path = self.folder / f"hostfile{count}"
        path.write_text("".join(f"{host.name} slots=1\n" for host in self.all[:count]))
        return path

    def cut(self, host: Host) -> None:
        """Pulls a host's cable out of the switch."""
        self._in_switch("link", "set", host.name, "down")

    def join(self, host: Host) -> None:
        """Plugs it in again."""
        self._in_switch("link", "set", host.name, "up")

    def limit(self, rate: str) -> None:
        """Slows down every host's link, such as to 100mbit."""
        for host in self.all:
            shape = ("tbf", "rate", rate, "burst", "128kbit", "latency", "400ms")
            host.run("tc", "qdisc", "replace", "dev", "eth0", "root", *shape)

    def _write_files(self, names: Sequence[str]) -> None:
        ssh = self.home / ".ssh"
        ssh.mkdir(parents=True, mode=0o700)
        keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f"]
        subprocess.run([*keygen, ssh / "id_ed25519"], check=True)
        shutil.copy(ssh / "id_ed25519.pub", ssh / "authorized_keys")
        known = []
        for name in names:
            subprocess.run([*keygen, self.folder / f"{name}.key"], check=True)
            public = (self.folder / f"{name}.key.pub").read_text()
            known.append(f"{name} {public}")
            # A host without a GPU, and with one thread a process.
            (self.folder / f"{name}.sshd").write_text(
                f"HostKey {self.folder / name}.key\nPidFile none\nUsePAM no\n"
                "PermitRootLogin yes\nSetEnv DS_ACCELERATOR=cpu OMP_NUM_THREADS=1\n"
            )
        (ssh / "known_hosts").write_text("".join(known))
        # What docs/clusters.md tells users to write.
        (ssh / "config").write_text("Host *\n  ServerAliveInterval 5\n  ServerAliveCountMax 3\n")
        addresses = [f"{NETWORK}.{number} {name}\n" for number, name in enumerate(names, 1)]
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(addresses))
        users = Path("/etc/passwd").read_text().splitlines()
        root = f"root:x:0:0:root:{self.home}:/bin/bash"
        others = [line for line in users if not line.startswith("root:")]
        (self.folder / "passwd").write_text("\n".join([root, *others]) + "\n")

    def _add(self, name: str, address: str) -> None:
        files = shlex.quote(str(self.folder))
        setup = (
            f"mount --bind {files}/hosts /etc/hosts; mount --bind {files}/passwd /etc/passwd; "
            "mount -t tmpfs -o mode=755 tmpfs /run; mkdir -m 755 /run/sshd; ip link set lo up; "
            f"exec $(command -v sshd) -D -f {files}/{name}.sshd"
        )
        host = Host(name, address, self.home, setup)
        self.all.append(host)
        veth = ("type", "veth", "peer", "name", "eth0", "netns", str(host.pid))
        self._in_switch("link", "add", name, *veth)
        self._in_switch("link", "set", name, "master", "switch", "up")
        for line in (f"address add {address}/24 dev eth0", "link set eth0 up"):
            enter = ["nsenter", "-t", str(host.pid), "-n", "ip"]
            subprocess.run([*enter, *line.split()], check=True, timeout=START_SECONDS)

    def _in_switch(self, *arguments: str) -> None:
        command = ["nsenter", "-t", str(self._switch_pid), "-n", "ip", *arguments]
        subprocess.run(command, check=True, timeout=START_SECONDS)

    def _wait_for_ssh(self, host: Host) -> None:
        command = self.all[0].command("ssh", "-o", "ConnectTimeout=5", host.name, "hostname")
        deadline = time.monotonic() + START_SECONDS
        while True:
            done = subprocess.run(command, capture_output=True, text=True, timeout=START_SECONDS)
            if done.stdout.strip() == host.name:
                return
            assert time.monotonic() < deadline, f"{host.name}: no sshd: {done.stderr}"
            time.sleep(0.1)


def _unshare(flags: list[str], command: list[str]) -> tuple[subprocess.Popen, int]:
    """Starts a command as the first process of new namespaces.

    Returns:
        The process that all of them end with, which itself ends with this one; and the id of the
        command.
    """
    outer = ["setpriv", "--pdeathsig", "KILL", "unshare", "--pid", "--kill-child", *flags, "--"]
    anchor = subprocess.Popen([*outer, *command], stdin=subprocess.DEVNULL)
    children = Path(f"/proc/{anchor.pid}/task/{anchor.pid}/children")
    deadline = time.monotonic() + START_SECONDS
    while not (text := children.read_text()) or not Path(f"/proc/{text.strip()}").exists():
        assert anchor.poll() is None, f"{command}: ended with code {anchor.returncode}"
        assert time.monotonic() < deadline, f"{command}: did not start"
        time.sleep(0.02)
    return anchor, int(text)
