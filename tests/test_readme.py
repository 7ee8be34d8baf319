"""The pages say what the code says: README, docs, launch, tokenizer, CONTRIBUTING, CHANGELOG."""

import importlib.util
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from infini_ds import cli, config
from tests.pages import (
    PAGES,
    README,
    ROOT,
    all_commands,
    anchors,
    blocks,
    inline_code,
    links,
    name_of,
    shell_commands,
)
from tests.tiny_run import tiny_config, write_checkpoint

MOST_LINES = 250

each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


# What is generated, and examples in Python


def test_the_page_of_settings_is_what_the_command_prints(capsys):
    page = (ROOT / "docs" / "configuration.md").read_text()
    section = re.search(r"<!-- configuration reference -->\n(.*)<!-- end of", page, re.DOTALL)
    assert section
    assert cli.main(["config"]) == 0
    assert section[1] == capsys.readouterr().out, "run `make docs`"


EXAMPLES = {
    "model": "import torch\nfrom infini_ds import InfiniTransformer",
    "load_model": "import torch\nfrom infini_ds import load_model",
    "memory": "import torch\nfrom infini_ds.kernels.infini_attention import",
    "recorder": "from infini_ds.training.recorders import",
    "ruler": "import json, random, types\nfrom lm_eval",
}


def python_example(which: str) -> str:
    (example,) = [code for code in blocks("python") if code.text.startswith(EXAMPLES[which])]
    return example.text


def test_every_python_example_is_run_by_a_test():
    for code in blocks("python"):
        assert code.text.startswith(tuple(EXAMPLES.values())), f"{name_of(code.page)}: {code.text}"


def test_python_example_runs_as_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(python_example("model"), names)
    assert names["text"].shape == (1, 32)
    assert names["out"].logits.shape == (1, 1300, 256)
    assert (tmp_path / "book.safetensors").exists()


def test_loading_a_model_runs_as_shown(tmp_path, monkeypatch, capsys):
    write_checkpoint(tiny_config(tmp_path / "runs" / "quickstart"))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(python_example("load_model"), names)
    assert names["written"].shape == (1, 32)
    assert capsys.readouterr().out.strip("\n")


def test_the_memory_alone_runs_as_shown():
    names: dict = {}
    exec(python_example("memory"), names)
    assert names["out"].shape == names["v"].shape
    assert names["memory"].kv.shape == (1, 8, 128, 128)


def test_the_recorder_runs_as_shown(tmp_path, capsys):
    names: dict = {}
    exec(python_example("recorder"), names)
    names["Printed"](tiny_config(tmp_path), 0).scalars(7, {"train/loss": 1.5})
    assert capsys.readouterr().out == "7 1.5\n"


# Commands


def commands_of(program: str) -> list[tuple[Path, list[str]]]:
    return [(page, words[1:]) for page, words in all_commands() if words[0] == program]


def help_of(command: tuple[str, ...], capsys) -> str:
    with pytest.raises(SystemExit) as ending:
        cli.main([*command, "--help"])
    assert not ending.value.code, f"infini-ds {' '.join(command)}: there is no such command"
    return capsys.readouterr().out


def test_commands_and_options_exist(capsys):
    helps: dict[tuple[str, ...], str] = {}
    shown = commands_of("infini-ds")
    assert len(shown) > 40
    for page, words in shown:
        nested = words[0] in ("convert", "bench")
        command = tuple(words[: 2 if nested and len(words) > 1 else 1])
        if command[-1].isupper() or command[0].startswith("-"):  # `infini-ds bench NAME`
            continue
        if command not in helps:
            helps[command] = help_of(command, capsys)
        for word in words[len(command) :]:
            option = word.partition("=")[0]
            if re.match(r"--?[a-z]", option):
                told = re.search(rf"(?<![\w-]){option}(?![\w-])", helps[command])
                assert told, f"{name_of(page)}: infini-ds {' '.join(words)}: {option}"


def test_configs_and_settings_in_commands_are_valid():
    checked = 0
    for _, words in all_commands():
        settings = [word for word in words if re.match(r"[a-z_]+(\.[a-z_]+)*=", word)]
        if not settings or words[0] not in ("infini-ds", "deepspeed", "bash", "sbatch", "torchrun"):
            continue
        named = [word for word in words if word.startswith("configs/")]
        path = ROOT / (named[0] if named else "configs/quickstart.yaml")
        config.load(path, [setting for setting in settings if "tokenizer/mine" not in setting])
        checked += 1
    assert checked > 5


def test_mixture_is_valid(tmp_path):
    mixtures = [code.text for code in blocks("yaml") if "mixture:" in code.text]
    assert mixtures
    for text in mixtures:
        tree = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({**tree, **yaml.safe_load(text)}))
        assert set(config.load(path).data.corpora) == {"books", "code"}


def test_targets_of_make_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    shown = {(name_of(page), words[0]) for page, words in commands_of("make") if words}
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "check.yml").read_text())
    for name, job in workflow["jobs"].items():
        runs = [step["run"].split() for step in job["steps"] if "run" in step]
        shown |= {(f"job {name}", words[1]) for words in runs if words[0] == "make"}
    assert {"job check", "job test"} <= {place for place, _ in shown}
    wrong = [f"{place}: make {target}" for place, target in shown if target not in targets]
    assert not wrong


@contextmanager
def standard_input(path: Path) -> Iterator[None]:
    """This process reads a file as its standard input."""
    before = os.dup(0)
    with path.open() as file:
        os.dup2(file.fileno(), 0)
    try:
        yield
    finally:
        os.dup2(before, 0)
        os.close(before)


def test_commands_after_training_run_as_shown(tmp_path, monkeypatch, capsys):
    """The block is typed into this process, on a run that no training made."""
    (block,) = [code for code in blocks("bash") if "infini-ds memorize" in code.text]
    write_checkpoint(tiny_config(tmp_path / "runs" / "quickstart"))
    for name in ("README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log").write_text("what git log prints")
    typed = 0
    for words in shell_commands(block.text):
        if words[0] == "infini-ds":
            with standard_input(tmp_path / "log"):
                assert cli.main(words[1:]) == 0, f"{words}: {capsys.readouterr().err}"
            typed += 1
    assert typed == 7
    for made in ("readme.memory.safetensors", "log.memory.safetensors", "exports/quickstart"):
        assert (tmp_path / made).exists()


# Words of the code in the pages


@each_page
def test_files_that_are_named_exist(page):
    text = "\n".join(inline_code(page) + [c.text for c in blocks("bash") if c.page == page])
    named = re.findall(r"(?<![\w/.~-])((?:infini_ds|tests|launch|configs)/[\w./-]*)", text)
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing
    for module in re.findall(r"(?<![\w/.])(infini_ds\.[a-z_]+)", text):
        assert importlib.util.find_spec(module), module


@each_page
def test_settings_that_are_named_exist(page, capsys):
    assert cli.main(["config"]) == 0
    known = set(re.findall(r"^\| `([\w.]+)` \|", capsys.readouterr().out, re.MULTILINE))
    assert len(known) > 80
    sections = {name.rpartition(".")[0] for name in known}
    first = "model|data|train|optimizer|parallel|kernels|evaluation"
    for code in inline_code(page):
        for name in re.findall(rf"(?<![\w./-])((?:{first})(?:\.[a-z_]+)+)(?![\w(/])", code):
            if name.endswith((".py", ".json")):  # a file
                continue
            of_mixture = re.sub(r"^data\.mixture\.[a-z]+", "data.mixture.NAME", name)
            assert {name, of_mixture} & (known | sections | {"data.mixture"}), code


# Links and sizes


@each_page
def test_links_lead_somewhere(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert file.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(file), target


def test_every_page_is_reached_from_the_readme():
    reached, waiting = {README}, [README]
    while waiting:
        page = waiting.pop()
        for target in links(page):
            path = target.partition("#")[0]
            file = Path(os.path.normpath(page.parent / path))
            if path and file.suffix == ".md" and file not in reached:
                reached.add(file)
                waiting.append(file)
    assert set(PAGES) <= reached, [name_of(page) for page in set(PAGES) - reached]


def test_images_are_shown_somewhere():
    shown = {
        (page.parent / target).resolve()
        for page in PAGES
        for target in links(page)
        if target.endswith(".png")
    }
    assert shown == set((ROOT / ".github" / "images").iterdir())


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize(
    "form", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").iterdir()), ids=name_of
)
def test_issue_form_has_what_github_asks_for(form):
    tree = yaml.safe_load(form.read_text())
    assert {"name", "description", "body"} <= tree.keys()
    ids = [field["id"] for field in tree["body"]]
    assert len(ids) == len(set(ids))
