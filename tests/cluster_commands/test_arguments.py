"""Arguments of a run arrive on every host as they were typed, or the run does not start."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from deepspeed.launcher.multinode_runner import PDSHRunner

from infini_ds.cluster import launcher, supervisor
from infini_ds.errors import UserError
from tests.distributed.conftest import SCRIPT

TYPED = {
    "plain": "train.steps=10",
    "variable": "evaluation.sample_prompt=costs $HOME",
    "variable_without_spaces": "output_dir=$HOME/a",
    "braced_variable": "a=${HOME}",
    "command": "a=$(echo b)",
    "backticks": "a=`echo b`",
    "double_quotes": 'a="b c"',
    "quotes": "a='b c'",
    "one_quote": "a=it's",
    "backslashes": r"a=\b \\c \$d \n",
    "spaces": "a=  b  c ",
    "line_break": "a=b\nc",
    "tab": "a=\tb",
    "commands": "a=b; c & d | e && f",
    "redirection": "a=b > c < d",
    "pattern": "data.files=[/*, /etc/host?]",
    "pattern_without_spaces": "data.files=/*",
    "braces": "data={a,b}",
    "tilde": "~/a",
    "tilde_behind": "output_dir=~/a",
    "comment": "#a",
    "history": "a=!b!!",
    "host": "a=%h",
    "user_and_rank": "a=%u %n",
    "percent": "a=100%%",
    "percent_encoded": "a=%20",
    "dash": "-a",
    "empty_value": "a=",
    "other_letters": "a=Länge 长度 🙂",
    "not_utf8": os.fsdecode(b"a=caf\xe9"),
    "equals": "a==b=c",
    "parentheses": "a=(b)",
}


def arrived(arguments: list[str], shell: str) -> list[str]:
    """What a program gets behind DeepSpeed's launcher, pdsh and a shell of the other host."""
    words = PDSHRunner.parse_user_args(SimpleNamespace(args=SimpleNamespace(user_args=arguments)))
    filled = {"%h": "node-1", "%u": "root", "%n": "0", "%%": "%"}
    command = " ".join([r"cd /; /usr/bin/env printf '%s\0'", *words])
    command = re.sub("%[hun%]", lambda found: filled[found[0]], command)
    done = subprocess.run([shell, "-c", command], capture_output=True, check=False)
    return [os.fsdecode(word) for word in done.stdout.split(b"\0")[:-1]]


@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_all_that_is_quoted_arrives(shell):
    typed = list(TYPED.values())
    assert launcher.unquoted(arrived(launcher.quoted(typed), shell)) == typed


@pytest.mark.parametrize("argument", TYPED.values(), ids=TYPED)
def test_argument_is_quoted_in_one_harmless_word(argument):
    (_, word) = launcher.quoted([argument])
    assert re.fullmatch(r"([\w.,:@+=/-]|%[0-9A-F]{2})*", word, re.ASCII)
    assert launcher.unquoted(launcher.quoted([argument])) == [argument]


def test_what_is_not_quoted_stays():
    assert launcher.unquoted(["run.yaml", "a=%20"]) == ["run.yaml", "a=%20"]


def test_script_takes_what_is_quoted():
    words = launcher.quoted(["no $5 %h.yaml", "a=b"])
    command = [sys.executable, str(SCRIPT), "--local_rank=0", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("infini-ds: config no $5 %h.yaml: cannot be read")


PORT = "--master_port=29500"
CHANGED = [name for name in TYPED if arrived([TYPED[name]], "bash") != [TYPED[name]]]


class TestLauncherThatQuotesNothing:
    """`deepspeed --hostfile HOSTS launch/pretrain.sh CONFIG ...`, typed on a host of the run."""

    @pytest.fixture
    def start(self, tmp_path, monkeypatch):
        """Starts a launcher with a pdsh, as whose rank this process appears."""
        pdsh = tmp_path / "pdsh.bin"  # as Debian has it
        pdsh.write_text("#!/bin/sh\necho\nsleep 600 & child=$!\ntrap 'kill $child' TERM\nwait\n")
        pdsh.chmod(0o755)
        world = f"--world_info={tmp_path.name}"
        started = []

        def start_launcher(typed: list[str], found: list[str], port: int = 29500) -> None:
            script = f"{pdsh} {world} --master_port={port} & trap 'kill $!' TERM; wait"
            command = ["bash", "-c", script, "deepspeed", "launch/pretrain.sh", *typed]
            started.append(subprocess.Popen(command, stdout=subprocess.PIPE))
            started[0].stdout.readline()
            monkeypatch.setattr(launcher, "_commands_above", lambda: [["python", world, PORT]])
            monkeypatch.setattr(sys, "argv", ["launch/pretrain.sh", "--local_rank=0", *found])

        yield start_launcher
        for process in started:
            process.terminate()
            process.wait()

    @pytest.mark.parametrize("name", CHANGED)
    def test_changed_argument_is_refused(self, start, name):
        start(["run.yaml", TYPED[name]], ["run.yaml", *arrived([TYPED[name]], "bash")])
        with pytest.raises(UserError) as caught:
            launcher.check_arguments_of_launcher()
        assert str(caught.value).startswith(f"{TYPED[name]!r} was typed, but ")
        assert "use `bash launch/pretrain.sh --hostfile HOSTS" in str(caught.value)

    def test_another_run_on_the_same_hosts_is_not_looked_at(self, start):
        start(["run.yaml", "train.steps=1"], ["run.yaml", "train.steps=2"], port=29501)
        launcher.check_arguments_of_launcher()

    def test_unchanged_arguments_are_not(self, start):
        start(["run.yaml", "train.steps=1", "a= b"], ["run.yaml", "train.steps=1", "a= b"])
        launcher.check_arguments_of_launcher()


def test_enough_is_changed_for_these_tests():
    assert len(CHANGED) > 15
    assert "plain" not in CHANGED


def test_rank_without_pdsh_is_not_looked_at(monkeypatch):
    monkeypatch.setattr(launcher.psutil, "process_iter", lambda: pytest.fail("looked"))
    launcher.check_arguments_of_launcher()


class TestWhatCannotBeQuoted:
    @pytest.fixture(autouse=True)
    def _apart(self, tmp_path, monkeypatch):
        """In a plain directory, without variables of others."""
        for name in [name for name in os.environ if name.startswith(launcher._EXPORTED)]:
            monkeypatch.delenv(name)
        monkeypatch.chdir("/")

    @pytest.mark.parametrize(
        "name",
        [
            "a b",
            "a$b",
            "a`b",
            "a'b",
            'a"b',
            "a;b",
            "a&b",
            "a*b",
            "a[1]",
            "a(b",
            "a%h",
            "a\\b",
            "a~",
        ],
    )
    def test_directory_is_refused(self, tmp_path, monkeypatch, name):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        with pytest.raises(UserError, match=r"^--hostfile: the directory .* use one without it$"):
            launcher.check_what_is_not_quoted("launch/pretrain.sh")

    @pytest.mark.parametrize("name", ["/a b/launch/pretrain.sh", "/$A/pretrain.sh", "/%h/a.sh"])
    def test_script_is_refused(self, name):
        with pytest.raises(UserError, match=r"^--hostfile: the script .* use one without it$"):
            launcher.check_what_is_not_quoted(name)

    @pytest.mark.parametrize(
        ("name", "value"),
        [("NCCL_DEBUG_FILE", "/tmp/%h.log"), ("NCCL_A", "a%%"), ("PYTHONPATH", "/a:$HOME/b"),
         ("PYTHONPATH", "/a b`"), ("UCX_A", 'a"b'), ("MV2_A", "a\\b"), ("MLFLOW_A", "%n"),
         ("NCCL_B", "%u")],
    )  # fmt: skip
    def test_variable_is_refused(self, monkeypatch, name, value):
        monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=rf"^--hostfile: environment variable {name} \("):
            launcher.check_what_is_not_quoted("launch/pretrain.sh")

    @pytest.mark.parametrize(
        ("name", "value"),
        [("NCCL_DEBUG", "INFO"), ("PYTHONPATH", "/a b:/c'd"), ("NCCL_A", "a;b&c*"), ("OTHER", "$A"),
         ("NCCL_DEBUG_FILE", "/tmp/%p")],
    )  # fmt: skip
    def test_other_variable_is_not(self, monkeypatch, name, value):
        monkeypatch.setenv(name, value)
        launcher.check_what_is_not_quoted("launch/pretrain.sh")


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The command that the supervisor makes of its options."""
    commands = []
    monkeypatch.setattr(supervisor, "supervise", lambda command, *_: commands.append(command) or 0)
    monkeypatch.setattr(supervisor.preflight, "run", lambda *_, **__: None)
    monkeypatch.setattr(supervisor, "check_what_is_not_quoted", lambda script: None)

    def make(*options: str) -> list[str]:
        assert supervisor.main(["launch/pretrain.sh", *options]) == 0
        return commands[0]

    return make


CONFIG = str(SCRIPT.parents[1] / "configs" / "quickstart.yaml")


def test_supervisor_quotes_for_several_hosts(command):
    prompt = "evaluation.sample_prompt=costs $HOME"
    made = command("--hostfile", "hosts", CONFIG, prompt)
    assert "--hostfile=hosts" in made
    script = made.index("launch/pretrain.sh")
    assert launcher.unquoted(made[script + 1 :]) == [CONFIG, prompt]
    assert not re.search("[$ ]", "".join(made[script:]))


def test_supervisor_leaves_arguments_alone_on_one(command):
    prompt = "evaluation.sample_prompt=costs $HOME"
    assert command(CONFIG, prompt)[-3:] == ["launch/pretrain.sh", CONFIG, prompt]


@pytest.mark.parametrize("option", ["", "$HOSTS", "~nobody-of-that-name/hosts"])
def test_supervisor_wants_paths(capsys, option):
    assert supervisor.main(["launch/pretrain.sh", "--hostfile", option, CONFIG]) == 2
    assert capsys.readouterr().err.startswith("infini-ds: --hostfile: ")
