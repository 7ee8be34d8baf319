"""The nodes of a Slurm job, as its variables have them."""

import pytest

from infini_ds.cluster import slurm
from infini_ds.errors import UserError

SCONTROL = """#!/bin/sh
[ "$*" = "show hostnames node-[1-3]" ] || exit 1
printf 'node-1\\nnode-2\\nnode-3\\n'
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    program = tmp_path / "scontrol"
    program.write_text(SCONTROL)
    program.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node-[1-3]")
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "8(x2),4")
    return monkeypatch


def test_nodes_come_in_order_with_their_tasks(job):
    assert list(slurm.nodes_of_job().items()) == [("node-1", 8), ("node-2", 8), ("node-3", 4)]


def test_outside_of_a_job_there_are_none(job):
    job.delenv("SLURM_JOB_NODELIST")
    assert slurm.nodes_of_job() == {}


def test_slurm_that_does_not_tell_is_an_error_that_names_the_variable(job):
    job.setenv("SLURM_JOB_NODELIST", "other")
    with pytest.raises(UserError, match="SLURM_JOB_NODELIST='other'"):
        slurm.nodes_of_job()


def test_tasks_of_other_nodes_are_an_error_that_names_the_variables(job):
    job.setenv("SLURM_TASKS_PER_NODE", "8(x2)")
    with pytest.raises(UserError, match=r"SLURM_TASKS_PER_NODE \(8\(x2\)\): describes 2 nodes"):
        slurm.nodes_of_job()


@pytest.mark.parametrize(
    ("text", "counts"), [("1", [1]), ("2(x3)", [2, 2, 2]), ("2,1(x2),16", [2, 1, 1, 16])]
)
def test_counts_of_tasks_are_read_as_slurm_writes_them(text, counts):
    assert slurm.tasks_per_node(text) == counts


STATE = """JobId=7 JobName=infini_ds
   JobState=RUNNING Reason=None Dependency=(null)
   PreemptEligibleTime=2026-11-28T10:00:00 PreemptTime={time}
   Command=/home/me/launch/pretrain.sbatch run.yaml JobState=TIMEOUT PreemptTime=now
"""


@pytest.mark.parametrize(
    ("time", "preempted"), [("None", False), ("", False), ("2026-11-28T10:00:01", True)]
)
def test_state_of_a_job_is_what_slurm_says_before_what_the_user_typed(monkeypatch, time, preempted):
    monkeypatch.setattr(slurm, "scontrol", lambda *_: STATE.format(time=time))
    assert slurm.state_of_job("7") == slurm.JobState("RUNNING", preempted)


def test_a_field_that_slurm_does_not_know_is_none(monkeypatch):
    monkeypatch.setattr(slurm, "scontrol", lambda *_: " JobState=COMPLETING \n")
    assert slurm.state_of_job("7") == slurm.JobState("COMPLETING")


def test_slurm_that_does_not_answer_is_an_error_within_a_limit(job, tmp_path):
    (tmp_path / "scontrol").write_text("#!/bin/sh\nexec sleep 60\n")
    job.setattr(slurm, "LIMIT_SECONDS", 0.2)
    with pytest.raises(UserError, match=r"SLURM_JOB_NODELIST=.* \(no answer within 0.2 s\)"):
        slurm.nodes_of_job()
    with pytest.raises(slurm.SlurmError, match=r"no answer within 0.2 s"):
        slurm.state_of_job("7")


def test_machine_without_slurm_is_an_error(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(slurm.SlurmError, match="scontrol"):
        slurm.state_of_job("7")
