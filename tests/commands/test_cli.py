"""Mistakes are one line that names the setting or the file, with exit code 2."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import infini_ds
from infini_ds import cli
from infini_ds.config import DataConfig, TokenizerConfig
from infini_ds.data.prepare import prepare
from infini_ds.errors import RunError, UserError
from infini_ds.system import exit_code
from tests import tiny
from tests.damage import cut, flip

COMMAND = Path(sys.executable).with_name("infini-ds")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    folder = tmp_path_factory.mktemp("cli")
    corpus = folder / "corpus.txt"
    corpus.write_text("one document of a few words\n" * 20)
    config = DataConfig(
        source="files",
        files=[str(corpus)],
        store=str(folder / "store"),
        held_out_fraction=0.0,
        tokenizer=TokenizerConfig(kind="bytes"),
    )
    prepare(config, workers=1)
    return config


@pytest.fixture
def config(tmp_path, data) -> Path:
    """A run on a store of its own."""
    shutil.copytree(data.store, tmp_path / "store")
    return write_config(tmp_path, data)


def write_config(folder: Path, data: DataConfig) -> Path:
    """The config of a run whose output and store are in the folder."""
    return tiny.write_run(
        folder / "run.yaml",
        output_dir=str(folder / "output"),
        data={**data.model_dump(), "store": str(folder / "store")},
        train={"batch_size": 1, "window_segments": 2},
    )


def run(*arguments, limit=60.0) -> subprocess.CompletedProcess:
    command = [str(COMMAND), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)


MISTAKES = [
    pytest.param("train.stepz=3", "unknown setting train.stepz; did you mean steps?", id="key"),
    pytest.param("train.steps=few", "train.steps: input should be a valid integer", id="type"),
    pytest.param("train.chunks=3", "window_segments (2) must be a multiple of chunks", id="value"),
    pytest.param("train.steps", "must look like key.path=value", id="override"),
]


@pytest.mark.parametrize("command", ["pretrain", "prepare"])
@pytest.mark.parametrize(("override", "message"), MISTAKES)
def test_mistake_in_the_config_is_one_line_with_code_2(config, capsys, command, override, message):
    assert cli.main([command, str(config), override]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("infini-ds: ")
    assert message in line


@pytest.mark.parametrize("command", ["pretrain", "prepare"])
def test_missing_config_is_named(tmp_path, capsys, command):
    path = tmp_path / "none.yaml"
    assert cli.main([command, str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"infini-ds: config {path}: cannot be read (No such file or directory)"


@pytest.mark.parametrize("command", ["pretrain", "prepare"])
def test_mistake_in_the_config_is_told_before_torch_is_imported(config, command):
    told_without_torch(command, str(config), "train.stepz=3")


def told_without_torch(*arguments: str) -> None:
    """The command ends at once with code 2 and one line, and nothing heavy was imported."""
    code = (
        f"import sys, time; from infini_ds.cli import main; code = main({arguments!r}); "
        "heavy = [name for name in ('torch', 'deepspeed') if name in sys.modules]; "
        "print(time.process_time(), code, *heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, *rest = done.stdout.split()
    assert float(seconds) < 3  # of a core: others may be using it
    assert rest == ["2"]
    assert len(done.stderr.splitlines()) == 1


def test_command_exits_with_the_code_and_no_traceback(tmp_path):
    done = run("pretrain", tmp_path / "none.yaml", limit=30)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


# What only the start of a run can tell: (what happens to the store, overrides, message).
RUN_MISTAKES = {
    "missing_store": (shutil.rmtree, [], "data.store {store}: not found; run `infini-ds prepare"),
    "empty_store": (
        lambda store: (store / "manifest.json").unlink(),
        [], "data.store {store}: has no valid manifest.json",
    ),
    "flipped_store": (
        lambda store: flip(store / "train.tokens"),
        [], "data.store {store}/train.tokens: is damaged (wrong checksum)",
    ),
    "cut_store": (
        lambda store: cut(store / "train.tokens", 2),
        [], "data.store {store}/train.tokens: has",
    ),
    "other_tokenizer": (
        None, ["data.tokenizer.kind=sentencepiece"],
        "data.tokenizer.kind is 'sentencepiece', but data.store {store} was made with 'bytes'",
    ),
    "missing_tokenizer_model": (
        None, ["data.tokenizer.kind=sentencepiece", "data.tokenizer.model=none.model"],
        "none.model",
    ),
    "small_vocabulary": (
        None, ["model.vocab_size=100"],
        "model.vocab_size (100) must be at least 258, the tokens of data.store {store}",
    ),
    "window_longer_than_the_store": (
        None, ["train.window_segments=999"],
        "train.window_segments (999) x train.batch_size (1) = 999 segments a step, but data.store",
    ),
    "stages_that_do_not_divide": (
        None, ["parallel.pipeline_stages=2"],
        "parallel.pipeline_stages (2) must divide the number of processes (1)",
    ),
    "batch_that_does_not_divide": (
        None, ["train.micro_batch_size=2", "train.batch_size=3"],
        "batch_size (3) must be a multiple of micro_batch_size (2)",
    ),
}  # fmt: skip

# All of them in one process: the imports take longer than anything they tell.
EACH = """
import contextlib, io, json, sys, time
from infini_ds.cli import main
results = {}
for name, arguments in json.loads(sys.argv[1]).items():
    error, began = io.StringIO(), time.process_time()
    with contextlib.redirect_stderr(error):
        code = main(arguments)
    results[name] = [code, error.getvalue(), time.process_time() - began]
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, data):
    """Exit code, standard error, seconds and store of each of RUN_MISTAKES."""
    arguments, stores = {}, {}
    for name, (spoil, overrides, _) in RUN_MISTAKES.items():
        folder = tmp_path_factory.mktemp(name)
        stores[name] = store = folder / "store"
        shutil.copytree(data.store, store)
        if spoil:
            spoil(store)
        arguments[name] = ["pretrain", str(write_config(folder, data)), *overrides]
    done = subprocess.run(
        [sys.executable, "-c", EACH, json.dumps(arguments)],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    return {name: (*result, stores[name]) for name, result in results.items()}


@pytest.mark.parametrize("name", RUN_MISTAKES)
def test_mistake_that_only_the_start_can_tell_is_one_line_with_code_2(outcomes, name):
    code, error, _, store = outcomes[name]
    assert code == 2
    (line,) = error.splitlines()
    assert line.startswith("infini-ds: ")
    assert RUN_MISTAKES[name][2].format(store=store) in line


def test_mistakes_are_told_quickly_once_the_imports_are_done(outcomes):
    assert max(seconds for _, _, seconds, _ in list(outcomes.values())[1:]) < 5


@pytest.mark.parametrize(
    "mistake", ["corrupt_store", "window_longer_than_the_store", "stages_that_do_not_divide"]
)
def test_mistake_of_a_single_process_is_told_before_torch_is_imported(config, mistake):
    overrides = {
        "window_longer_than_the_store": ["train.window_segments=999"],
        "stages_that_do_not_divide": ["parallel.pipeline_stages=2"],
    }
    if mistake == "corrupt_store":
        flip(config.parent / "store" / "train.tokens")
    told_without_torch("pretrain", str(config), *overrides.get(mistake, []))


def parsers(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()):
    """The path of every command."""
    yield path
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from parsers(inner, (*path, name))


COMMANDS = list(parsers(cli._parser()))


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from infini_ds import cli; cli._parser().format_help(); "
        "print(sys.modules.keys() & {'torch', 'deepspeed', 'pydantic', 'rich'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: " ".join(path) or "infini-ds")
def test_help_of(path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([*path, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: infini-ds")
    for other in COMMANDS:
        if other[:-1] == path and other:
            assert other[-1] in shown


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["pretrian", "x"], ["pretrain"], ["bench"], ["bench", "quality"],
        ["bench", "peer", "--dtype=int"],
    ],
    ids=lambda arguments: " ".join(arguments) or "nothing",
)  # fmt: skip
def test_command_that_does_not_exist_or_is_incomplete_has_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["processes", "steps"])
def test_bench_transport_needs_one_of_each(capsys, option):
    assert cli.main(["bench", "transport", f"--{option}=0"]) == 2
    assert capsys.readouterr().err == f"infini-ds: --{option} (0) must be at least 1\n"


def test_bench_names_what_must_be_integers(capsys):
    assert cli.main(["bench", "peer", "--segments", "512,x"]) == 2
    assert "'512,x': must be integers" in capsys.readouterr().err


WRITING = [
    ["preflight", "{config}"], ["status", "none"], ["inspect", "none"], ["evaluate", "none"],
    ["passkey", "none"], ["babilong", "none"], ["bench", "peer"], ["bench", "transport"],
    ["bench", "kernels"], ["bench", "quality", "{config}"], ["bench", "context", "{config}"],
]  # fmt: skip


@pytest.mark.parametrize("arguments", WRITING, ids=" ".join)
def test_file_of_figures_that_is_a_directory_is_told_before_any_work(config, arguments, capsys):
    arguments = [argument.format(config=config) for argument in arguments]
    assert cli.main([*arguments, "--json", str(config.parent)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line == f"infini-ds: --json {config.parent}: is a directory; name a file"


PASSKEY_MISTAKES = {
    "no_such_run": ([], "run {run}: no such directory; name the output_dir of a run"),
    "segments_not_integers": (["--segments=16,x"], "'16,x': must be integers"),
    "segments_too_few": (["--segments=16,1"], "--segments (16,1): must each be at least 2"),
    "samples": (["--samples=0"], "--samples (0) must be at least 1"),
    "depths": (["--depths=0"], "--depths (0) must be at least 1"),
    "filler": (["--filler=sand"], "--filler (sand) must be one of standard, noise, text"),
    "keys": (["--keys=0"], "--keys (0) must be at least 1"),
    "queries": (["--queries=0"], "--queries (0) must be a number of at least 1, or all"),
    "queries_in_words": (["--queries=some"], "--queries (some) must be a number of at least 1, or"),
    "values": (["--values=0"], "--values (0) must be at least 1"),
    "form": (["--form=list"], "--form (list) must be one of sentence, adjacent, variables"),
    "json": (["--json={run}/a.json"], "--json {run}/a.json: its directory does not exist"),
}


@pytest.mark.parametrize("name", PASSKEY_MISTAKES)
def test_mistake_in_passkey_is_one_line_with_code_2(tmp_path, capsys, name):
    arguments, message = PASSKEY_MISTAKES[name]
    run = tmp_path / "none"
    assert cli.main(["passkey", str(run), *(each.format(run=run) for each in arguments)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("infini-ds: ")
    assert message.format(run=run) in line


BABILONG_MISTAKES = {
    "no_such_run": ([], "run {run}: no such directory; name the output_dir of a run"),
    "segments_not_integers": (["--segments=16,x"], "'16,x': must be integers"),
    "segments_too_few": (["--segments=1"], "--segments (1): must each be at least 2"),
    "samples": (["--samples=0"], "--samples (0) must be at least 1"),
    "tasks": (["--tasks=qa1,qa4"], "--tasks (qa1,qa4) must be of qa1, qa2, qa3, qa8, with commas"),
    "no_tasks": (["--tasks="], "--tasks () must be of qa1, qa2, qa3, qa8, with commas"),
    "filler": (["--filler=sand"], "--filler (sand) must be one of standard, noise, text"),
    "batch": (["--batch=0"], "--batch (0) must be at least 1"),
    "seed": (["--seed=-1"], "--seed (-1) must be at least 0"),
    "plot": (["--plot={run}/a.png"], "--plot {run}/a.png: its directory does not exist"),
}


@pytest.mark.parametrize("name", BABILONG_MISTAKES)
def test_mistake_in_babilong_is_one_line_with_code_2(tmp_path, capsys, name):
    arguments, message = BABILONG_MISTAKES[name]
    run = tmp_path / "none"
    assert cli.main(["babilong", str(run), *(each.format(run=run) for each in arguments)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("infini-ds: ")
    assert message.format(run=run) in line


def test_passkey_of_a_run_without_a_valid_checkpoint_is_one_line_with_code_2(tmp_path, capsys):
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    assert cli.main(["passkey", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "step_00000001: cannot be used, it was not finished (no manifest.json)" in line


def test_config_prints_the_reference(capsys):
    assert cli.main(["config"]) == 0
    shown = capsys.readouterr().out
    for name in ("`output_dir`", "`model.hidden_size`", "`data.tokenizer.kind`", "`train.chunks`"):
        assert f"| {name} |" in shown


def test_config_prints_the_settings_of_a_run(config, capsys):
    assert cli.main(["config", str(config), "train.steps=7"]) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert (tree["train"]["steps"], tree["optimizer"]["beta1"]) == (7, 0.9)


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"infini-ds {version('infini-ds')}\n"
    assert infini_ds.__version__ == version("infini-ds")


def test_overrides_are_not_required(capsys):
    with pytest.raises(SystemExit):
        cli.main(["plan"])
    assert "are required: CONFIG, --processes\n" in capsys.readouterr().err


def test_overrides_may_come_after_options(config, capsys):
    arguments = ["prepare", str(config), "train.steps=2", "--force", "data.max_documents=1"]
    assert cli.main(arguments) == 0
    assert "documents" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [["prepare", "{config}", "--force", "--forse"], ["status", "none", "train.steps=2"]],
    ids=["option", "override_of_a_command_without_config"],
)
def test_unknown_argument_is_named(config, arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([argument.format(config=config) for argument in arguments])
    assert ended.value.code == 2
    assert f"unrecognized arguments: {arguments[-1]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["plan", "status", "passkey", "babilong", "evaluate", "inspect", "bench"]
)
def test_figures_that_cannot_be_written_are_told_before_they_are_made(tmp_path, capsys, command):
    (tmp_path / "lost").symlink_to(tmp_path / "none" / "a.json")
    rest = {"plan": ["a.yaml", "--processes=1"], "bench": ["kernels"]}.get(command, ["none"])
    assert cli.main([command, *rest, "--json", str(tmp_path / "lost")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("lost: cannot be written (No such file or directory)")


@pytest.mark.parametrize(
    ("error", "code"),
    [(UserError("wrong"), 2), (RunError("gone"), 1), (KeyboardInterrupt("interrupted"), 130),
     (None, 0)],
    ids=str,
)  # fmt: skip
def test_exit_code_of(error, code, capsys):
    def command():
        if error:
            raise error

    assert exit_code.exit_code(command) == code
    assert capsys.readouterr().err == (f"infini-ds: {error}\n" if error else "")


@pytest.mark.parametrize("bug", [KeyError(), BrokenPipeError(), FileNotFoundError()], ids=repr)
def test_exit_code_leaves_the_bugs_alone(bug, capfd):
    def command():
        raise bug

    with pytest.raises(type(bug)):
        exit_code.exit_code(command)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["config"], ["preflight", "{config}"]], ids=lambda a: a[0])
def test_output_that_nobody_reads_ends_a_command_quietly(config, arguments, unbuffered):
    process = subprocess.Popen(
        [str(COMMAND), *(argument.format(config=config) for argument in arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    assert process.stdout
    process.stdout.close()
    assert process.communicate()[1] == b""
    assert process.returncode == 141


@pytest.mark.parametrize("arguments", [["config"], ["--help"]], ids=" ".join)
def test_output_that_cannot_be_written_is_one_line(arguments):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [str(COMMAND), *arguments], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 1
    assert done.stderr == b"infini-ds: cannot write (No space left on device)\n"


@pytest.mark.parametrize(
    ("error", "rank", "shown"),
    [
        pytest.param(UserError("wrong"), "0", "infini-ds: wrong\n", id="mistake_on_rank_0"),
        pytest.param(UserError("wrong"), "1", "infini-ds rank 1: wrong\n", id="mistake_on_rank_1"),
        pytest.param(RunError("gone"), "1", "infini-ds rank 1: gone\n", id="failure_on_rank_1"),
    ],
)
def test_ranks_tell_their_errors(monkeypatch, capsys, error, rank, shown):
    monkeypatch.setattr(exit_code, "_HEAD_START_SECONDS", 0.0)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")

    def command():
        raise error

    exit_code.exit_code(command)
    assert capsys.readouterr().err == shown


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "0"}, "variable WORLD_SIZE=0: must be above RANK (0)"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "variable WORLD_SIZE=2: must be above RANK (2)"),
        (
            {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"},
            "variable WORLD_SIZE=2: needs MASTER_PORT, RANK as well",
        ),
    ],
    ids=["none", "rank", "missing"],
)
def test_launchers_variables_that_do_not_fit_are_named(
    monkeypatch, capsys, config, variables, message
):
    monkeypatch.setattr(exit_code, "_HEAD_START_SECONDS", 0.0)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["pretrain", str(config)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"])
def test_launchers_variable_without_a_number_is_named(monkeypatch, capsys, config, name):
    monkeypatch.setenv(name, "")
    assert cli.main(["pretrain", str(config)]) == 2
    assert f"environment variable {name}='': must be a number" in capsys.readouterr().err
