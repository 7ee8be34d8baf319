"""Slurm on the hosts: munged and slurmd on each, slurmctld on the first."""

import os
import re
import time
from pathlib import Path

from tests.cluster.hosts import PROGRAMS as PROGRAMS_OF_HOSTS
from tests.cluster.hosts import Host, Hosts
from tests.distributed.conftest import SCRIPT, Run
from tests.distributed.processes import Process

PROGRAMS = {
    **PROGRAMS_OF_HOSTS, "munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd",
    "sbatch": "slurm-client",
}  # fmt: skip
BATCH = SCRIPT.with_name("pretrain.sbatch")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL")
START_SECONDS = 120.0
CONFIG = """
ClusterName=tests
SlurmctldHost={first}
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=20
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
NodeName={names} CPUs=2 State=UNKNOWN
PartitionName=train Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=40 State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=9 PreemptMode=OFF State=UP
"""


class Slurm:
    """A partition `train` of all hosts, and `urgent`, whose jobs preempt those of `train`."""

    def __init__(self, hosts: Hosts, folder: Path):
        self.hosts, self.folder = hosts, folder
        self._config = folder / "slurm.conf"
        self._environment = ("env", f"SLURM_CONF={self._config}")
        names = ",".join(host.name for host in hosts.all)
        self._config.write_text(CONFIG.format(folder=folder, first=hosts[0].name, names=names))
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self._daemons: list[Process] = []
        for host in hosts.all:
            host.run("mkdir", "-p", "/run/munge")
            state = ["--pid-file=/run/munge/pid", f"--seed-file={folder}/{host.name}.seed"]
            log = f"--log-file={folder}/{host.name}.munged"
            self._start(host, "munged", "--foreground", "--force", f"--key-file={key}", *state, log)
        self._start(hosts[0], "slurmctld", "-D")
        for host in hosts.all:
            self._start(host, "slurmd", "-D", "-N", host.name)
        self._wait_for_nodes()

    def __enter__(self) -> "Slurm":
        return self

    def __exit__(self, *_) -> None:
        for daemon in reversed(self._daemons):
            daemon.kill_group()

    def run(self, *command: str, cwd: Path | None = None, check: bool = True) -> str:
        """Runs one of Slurm's commands on the first host; its output."""
        return self.hosts[0].run(*self._environment, *command, cwd=cwd, check=check)

    def submit(self, *command: str, cwd: Path) -> str:
        """Submits a job; its id."""
        return self.run("sbatch", "--parsable", *command, cwd=cwd).strip()

    def job(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", job)))

    def _start(self, host: Host, *command: str) -> None:
        log = self.folder / f"{host.name}.{command[0]}.log"
        self._daemons.append(host.start(*self._environment, *command, log=log))

    def _wait_for_nodes(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            ended = [daemon for daemon in self._daemons if daemon.code is not None]
            assert not ended, [(daemon.log.name, daemon.output) for daemon in ended]
            logs = "\n".join(daemon.output for daemon in self._daemons)
            assert time.monotonic() < deadline, logs
            idle = self.run("sinfo", "-hN", "-t", "idle", "-p", "train", check=False)
            if len(idle.splitlines()) == len(self.hosts.all):
                return
            time.sleep(0.5)


class Job:
    """The batch script submitted from a run's folder."""

    def __init__(self, slurm: Slurm, run: Run, options: list[str], overrides: list[str]):
        self._slurm, self.run = slurm, run
        # The script asks for eight GPUs a node.
        resources = ["--ntasks-per-node=1", "--gpus-per-node=0", *options]
        command = [*resources, str(BATCH), str(run.config), *overrides]
        self.id = slurm.submit(*command, cwd=run.folder)

    @property
    def log(self) -> str:
        path = self.run.folder / f"slurm-{self.id}.out"
        return path.read_text() if path.exists() else ""

    @property
    def outputs(self) -> str:
        logs = sorted((self.run.output / "logs").glob("rank_*.log"))
        return "\n".join([self.log, *(f"--- {path.name}\n{path.read_text()}" for path in logs)])

    @property
    def state(self) -> dict[str, str]:
        """What Slurm knows of it."""
        return self._slurm.job(self.id)

    def processes(self) -> list[str]:
        """Command lines of what it started on any node: all name its directory."""
        found = [host.processes(str(self.run.folder)) for host in self._slurm.hosts.all]
        return [line for lines in found for line in lines.values()]

    def wait_until(self, condition, limit: float, what: str) -> None:
        deadline = time.monotonic() + limit
        while not condition():
            assert time.monotonic() < deadline, f"waited for {what}: {self.state}\n{self.outputs}"
            time.sleep(0.2)

    def finish(self, limit: float) -> dict[str, str]:
        """Waits for its end; what Slurm then knows of it."""
        self.wait_until(lambda: self.state["JobState"] in ENDED, limit, "the end of the job")
        return self.state
