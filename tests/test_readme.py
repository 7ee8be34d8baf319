"""The README says what the code says."""

import re
from pathlib import Path

import torch

from infini_ds import config
from tests.tiny_run import tiny_config, write_checkpoint

README = Path(__file__).parents[1] / "README.md"


def test_configuration_reference_in_the_readme_is_that_of_the_code():
    section = re.search(
        r"<!-- configuration reference -->\n(.*)<!-- end of", README.read_text(), re.DOTALL
    )
    assert section
    assert section[1] == config.reference(), "run `make docs`"


def test_python_example_in_the_readme_runs_as_shown(tmp_path, monkeypatch):
    example = re.search(r"## From Python\n\n```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert example
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(example[1], names)
    assert names["text"].shape == (1, 32)
    assert names["out"].logits.shape == (1, 1300, 256)
    assert (tmp_path / "book.safetensors").exists()


def test_loading_a_model_in_the_readme_runs_as_shown(tmp_path, monkeypatch, capsys):
    example = re.search(r"```python\n(import torch\nfrom infini_ds import load_model.*?)```",
                        README.read_text(), re.DOTALL)  # fmt: skip
    assert example
    write_checkpoint(tiny_config(tmp_path / "runs" / "quickstart"))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(example[1], names)
    assert names["written"].shape == (1, 32)
    assert capsys.readouterr().out.strip("\n")


def test_the_memory_alone_in_the_readme_runs_as_shown():
    example = re.search(
        r"```python\n(from infini_ds.kernels.infini_attention import.*?)```",
        README.read_text(), re.DOTALL,
    )  # fmt: skip
    assert example
    names: dict = {"torch": torch}
    exec(example[1], names)
    assert names["out"].shape == names["v"].shape
    assert names["memory"].kv.shape == (1, 8, 128, 128)
