"""Every fault of a host is found beside hosts that are well, and told with what to do about it."""

import json
import os
import re
import sys
import time

import pytest

from infini_ds import cli
from infini_ds.cluster import gather, session, way
from infini_ds.cluster.findings import Finding, Host, judge
from infini_ds.cluster.preflight import one_line
from infini_ds.config import load
from tests.cluster_commands.hosts import Hosts, write_run

# All on one host, by the check that finds each: (what runs first there, what is found, remedy).
FAULTS = {
    "versions": (
        "import importlib.metadata as m; version = m.version\n"
        "m.version = lambda name: '0.1' if name == 'deepspeed' else version(name)",
        "deepspeed 0.1, here 0.", "install there what is installed here",
    ),
    "output_dir": (
        "import errno, pathlib\n"
        "def touch(*_, **__): raise PermissionError(errno.EACCES, 'Permission denied')\n"
        "pathlib.Path.touch = touch",
        "output cannot be written (Permission denied)", "give this user the right to",
    ),
    "disk": (
        "import shutil, types; shutil.disk_usage = lambda path: types.SimpleNamespace(free=999)",
        "0.0 MB free, a checkpoint takes", "make room",
    ),
    "memory": (
        "import psutil, types\n"
        "psutil.virtual_memory = lambda: types.SimpleNamespace(available=999)",
        "the host has 0.0 MB free, at least", "a smaller train.batch_size",
    ),
    "clock": (
        "import time; now = time.time; time.time = lambda: now() - 600",
        " s beside node-1", "let NTP set the clocks",
    ),
    "network": (
        "network.route_to = lambda address: network.Route('lo', '127.0.0.1', address)",
        "lo 127.0.0.1 is the way to 10.0.0.1 of node-1", "deepspeed --master_addr",
    ),
}  # fmt: skip
# Elsewhere: (host, check that finds it, what is found, remedy).
OTHERS = [
    ("gone", "reached", "Could not resolve hostname", "`ssh gone true` must work"),
    ("broken", "reached", "No module named infini_ds (exit code 1)", sys.executable),
    ("gpus", "devices", "2 devices for 3 slots", "slots=2 in the hostfile"),
    ("apart", "store", "not the one of node-1", "file system that all hosts share"),
    ("apart", "config", "train.steps is 2, here 1", "copy it there"),
    ("apart", "output_dir", "a file that node-1 wrote in output is not", "all hosts share"),
    ("no-store", "store", "data.store store: not found; run `infini-ds prepare", ""),
    ("no-config", "config", "config run.yaml: cannot be read (No such file", "copy it there"),
]
TORCH = """
class cuda:
    device_count = staticmethod(lambda: 2)
    mem_get_info = staticmethod(lambda index: (10**12, 10**12))
    get_device_capability = staticmethod(lambda index: (8, 0))
"""


@pytest.fixture(scope="module")
def module_patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def well(tmp_path_factory):
    hosts = Hosts(tmp_path_factory.mktemp("well"))
    for name in ("node-1", "node-2"):
        hosts.add(name)
    return hosts


@pytest.fixture
def at_well(well, monkeypatch):
    enter(well, monkeypatch)
    return well


def enter(hosts, patch) -> None:
    patch.chdir(hosts.shared)
    for name in [name for name in os.environ if name.startswith(("PYTHON", "NCCL"))]:
        patch.delenv(name)
    for name, value in hosts.environment().items():
        patch.setenv(name, value)
    patch.setattr(gather, "_LIMIT_SECONDS", 300.0)  # a loaded machine is no fault


@pytest.fixture(scope="module")
def ill(tmp_path_factory, module_patch):
    """All faults at once; what the JSON file says."""
    hosts = Hosts(tmp_path_factory.mktemp("ill"))
    hosts.add("node-1")
    hosts.add("faulty", "\n".join(fault for fault, _, _ in FAULTS.values()))
    hosts.unreachable("gone")
    hosts.add("broken", "import os; os.write(2, b'No module named infini_ds'); os._exit(1)")
    gpus = hosts.add("gpus", "import os; os.environ.pop('DS_ACCELERATOR', None)", slots=3)
    (gpus / "torch.py").write_text(TORCH)
    apart = hosts.add_apart("apart", "corpus.txt", "store", "run.yaml", "output")
    write_run(apart, "another document\n")
    text = (apart / "run.yaml").read_text()
    (apart / "run.yaml").write_text(text.replace("steps: 1", "steps: 2"))
    (apart / "output").mkdir()
    hosts.add_apart("no-store", "store")
    hosts.add_apart("no-config", "run.yaml")
    enter(hosts, module_patch)
    told = hosts.folder / "told.json"
    arguments = ["preflight", "run.yaml", "--hostfile", str(hosts.hostfile), "--json", str(told)]
    assert cli.main([*arguments, "train.batch_size=10", "parallel.pipeline_stages=1"]) == 2
    assert list(hosts.folder.glob("**/.preflight*")) == []
    return json.loads(told.read_text())


def finding(told: dict, host: str, check: str) -> dict:
    (found,) = [f for f in told["findings"] if (f["host"], f["check"]) == (host, check)]
    return found


@pytest.mark.parametrize(
    ("host", "check", "what", "remedy"),
    [*(("faulty", check, what, remedy) for check, (_, what, remedy) in FAULTS.items()), *OTHERS],
)
def test_fault_is_found_and_a_remedy_told(ill, host, check, what, remedy):
    found = finding(ill, host, check)
    assert found["state"] == ("warning" if check == "clock" else "failed")
    assert what in found["found"]
    assert remedy in found["remedy"]


def test_line_has_the_first_fault_whole_and_the_hosts_of_the_others():
    def failed(host: str, check: str, found: str, remedy: str = "") -> Finding:
        return Finding(host, check, "failed", found, remedy)

    first = failed("node-2", "store", "not the one of node-1", "copy it there")
    assert one_line([first]) == "node-2: store: not the one of node-1; copy it there"
    others = [failed(f"node-{number}", "disk", "is full") for number in (2, 3, 4, 5, 6, 7)]
    told = one_line([failed("all", "layout", "no"), *others])
    assert told.startswith("all hosts: layout: no (and more in the table, of node-2, node-3, ")
    assert told.endswith(", node-5 and 2 more)")


def test_clock_is_measured(ill):
    clocks = [ill["hosts"][host]["clock"]["ahead"] for host in ("node-1", "faulty")]
    assert clocks == pytest.approx([0, -600], abs=60)


def test_nothing_else_is_wrong(ill):
    wrong = {(f["host"], f["check"]) for f in ill["findings"] if f["state"] != "good"}
    assert wrong == {("faulty", check) for check in FAULTS} | {other[:2] for other in OTHERS}
    assert ill["good"] is False


def test_hosts_that_are_well_are_one_line_when_quiet(at_well, capsys):
    arguments = ["preflight", "run.yaml", "--quiet", "--hostfile", str(at_well.hostfile)]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr()
    (line,) = shown.out.splitlines()
    assert line.startswith("preflight: 2 hosts good (")
    assert shown.err == ""
    assert list(at_well.shared.glob("**/.preflight*")) == []


def test_table_has_every_check_and_failures_are_one_line_of_code_2(at_well, capsys):
    arguments = ["preflight", "run.yaml", "--hostfile", str(at_well.hostfile)]
    assert cli.main([*arguments, "parallel.pipeline_stages=2", "train.batch_size=1"]) == 0
    shown = capsys.readouterr().out
    for check in (
        "reached", "versions", "devices", "layout", "config", "store", "output_dir", "disk",
        "memory", "clock", "network",
    ):  # fmt: skip
        assert f"\n {check} " in shown
    assert "GLOO_SOCKET_IFNAME=eth0" in "".join(shown.split())
    assert cli.main([*arguments, "--quiet", "parallel.pipeline_stages=3"]) == 2
    shown = capsys.readouterr()
    assert "parallel.pipeline_stages (3) must divide" in " ".join(shown.out.split())
    (line,) = shown.err.splitlines()
    assert line.startswith(
        "infini-ds: preflight: all hosts: layout: parallel.pipeline_stages (3) m"
    )


SRUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do
  case $1 in --nodelist=*) node=${1#*=} ;; esac
  shift
done
[ -d "$HOSTS/$node" ] || { echo "srun: error: Unable to create step: Node failure" >&2; exit 1; }
PYTHONPATH=$HOSTS/$node exec "$@"
"""


@pytest.mark.parametrize("second", ["node-2", "gone"])
def test_nodes_of_a_slurm_job_are_asked_by_srun(at_well, tmp_path, monkeypatch, capsys, second):
    scontrol = f"#!/bin/sh\nprintf 'node-1\\n{second}\\n'\n"
    for name, text in (("srun", SRUN), ("scontrol", scontrol)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "anything")
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "1(x2)")
    code = cli.main(["preflight", "run.yaml", "--quiet"])
    shown = capsys.readouterr()
    if second == "node-2":
        assert code == 0
        assert shown.out.startswith("preflight: 2 hosts good (")
    else:
        assert code == 2
        why = "srun: error: Unable to create step: Node failure (exit code 1)"
        told = f"infini-ds: preflight: gone: reached: {why}; see `scontrol show node gone`"
        assert shown.err.startswith(told)


def test_this_host_alone_needs_no_ssh(at_well, capsys, monkeypatch):
    monkeypatch.setenv("PATH", os.defpath)
    assert cli.main(["preflight", "run.yaml", "--quiet"]) == 0
    assert capsys.readouterr().out.startswith("preflight: 1 host good")


def test_missing_ssh_is_told(at_well, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(at_well.shared))
    assert cli.main(["preflight", "run.yaml", "--hostfile", str(at_well.hostfile)]) == 2
    assert capsys.readouterr().err.startswith("infini-ds: ssh: no such program")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.yaml"], "config none.yaml: cannot be read"),
        (["run.yaml", "--hostfile", "none"], "hostfile none: cannot be read"),
        (["run.yaml", "--json", "none/a.json"], "--json none/a.json: its directory"),
    ],
)
def test_mistake_is_one_line_with_code_2(at_well, capsys, arguments, message):
    assert cli.main(["preflight", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert message in line


def test_host_that_hangs_is_left_after_the_limit(tmp_path, monkeypatch):
    program = tmp_path / "ssh"
    program.write_text("#!/bin/sh\nsleep 600\n")
    program.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    began = time.monotonic()
    with (
        session.Session(way.over_ssh("node-1"), limit=0.5) as opened,
        pytest.raises(session.HostLost, match=r"no answer within 0\.5 s"),
    ):
        opened.wait_until_ready()
    assert time.monotonic() - began < 60


def test_devices_are_compared_with_the_ranks_that_use_them(at_well):
    config = load("run.yaml", ["parallel.pipeline_stages=2", "train.micro_batch_size=2"])
    facts = {"errors": {}, "vocab_size": 258, "memory": 10**12, "devices": [10**9, 1000]}
    (found,) = [f for f in judge(config, {}, [Host("node-1", 2, facts)]) if f.check == "memory"]
    assert found.state == "failed"
    assert found.found.startswith("device 1 has 0.0 MB free, at least")


def test_processes_must_fit_the_layout(at_well):
    hosts = [Host(name, 3, {}, session.HostLost("gone", "look")) for name in ("node-1", "node-2")]
    found = {f.check: f for f in judge(load("run.yaml"), {}, hosts)}
    assert found["layout"].found.startswith("train.batch_size (2) must be a multiple of")
    assert found["layout"].host == "all"


def test_assembler_of_the_gpus_is_told(ill):
    assert re.fullmatch(
        r"ptxas 1\d\.\d+\.\d+ \(Triton 3\.\d\.\d\)", finding(ill, "gpus", "ptxas")["found"]
    )
    assert not [f for f in ill["findings"] if (f["host"], f["check"]) == ("node-1", "ptxas")]


@pytest.mark.parametrize("fault", ["", "may make wrong code"])
def test_assembler_with_a_fault_is_a_warning_with_a_remedy(at_well, fault):
    ptxas = {"version": "12.8.93", "origin": "Triton 3.7.1", "fault": fault}
    facts = {"errors": {}, "devices": [1], "ptxas": ptxas}
    hosts = [Host("node-1", 1, facts)]
    (found,) = [f for f in judge(load("run.yaml"), {}, hosts) if f.check == "ptxas"]
    told = f"ptxas 12.8.93 (Triton 3.7.1) {fault}".strip()
    remedy = "pip install 'nvidia-cuda-nvcc>=13.3'" if fault else ""
    assert found == Finding("node-1", "ptxas", "warning" if fault else "good", told, remedy)
