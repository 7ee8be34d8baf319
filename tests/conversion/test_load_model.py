"""Every command that uses a model takes an export as it takes the run that the export is of."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from infini_ds import cli
from infini_ds.data.sentencepiece_tokenizer import train_sentencepiece
from infini_ds.errors import UserError
from infini_ds.inspection.describe import describe
from infini_ds.runs.export import load_model
from tests.tiny_run import tiny_config, write_checkpoint

torch.set_num_threads(1)

TEXT = "".join(f"line {number} of the book\n" for number in range(20))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`run`, the same model as `export` and `one.safetensors`, and book.txt."""
    folder = tmp_path_factory.mktemp("models")
    write_checkpoint(tiny_config(folder / "run", segment_length=64))
    for name in ("export", "one.safetensors"):
        command("convert", "to-safetensors", folder / "run", folder / name)
    (folder / "book.txt").write_text(TEXT)
    return folder


def command(*arguments) -> None:
    assert cli.main(list(map(str, arguments))) == 0


@pytest.mark.parametrize("name", ["export", "one.safetensors"])
def test_generate_and_memorize(name, folder, tmp_path, capsys):
    outputs = {}
    for model in ("run", name):
        memory = tmp_path / f"{model}.memory"
        command("memorize", folder / model, folder / "book.txt", "-o", memory)
        capsys.readouterr()
        asked = ["--prompt=What?", "--greedy", "--max-new-tokens=20", "--memory", memory]
        command("generate", folder / model, *asked)
        outputs[model] = capsys.readouterr().out
    assert outputs["run"] == outputs[name]
    # They are one model: a memory of either goes on with the other.
    command("generate", folder / name, "--prompt=a", "--memory", tmp_path / "run.memory")


@pytest.mark.parametrize("name", ["export", "one.safetensors"])
def test_evaluate_and_passkey(name, folder, tmp_path):
    figures = {}
    for model in ("run", name):
        outputs = [tmp_path / f"{model}.{kind}.json" for kind in ("evaluate", "passkey")]
        rest = [f"--plot={tmp_path / 'plot.png'}", "--json"]
        documents = ["--documents", folder / "book.txt"]
        command("evaluate", folder / model, *documents, *rest, outputs[0])
        asked = ["--segments=3", "--samples=1", "--depths=1"]
        command("passkey", folder / model, *asked, *rest, outputs[1])
        figures[model] = [json.loads(path.read_text()) for path in outputs]
        for each in figures[model]:
            for differs in ("checkpoint", "step", "tokens_per_second"):
                del each[differs]
    (evaluated, answered), (expected, expected_answers) = figures[name], figures["run"]
    assert evaluated["documents"] == expected["documents"] == 1
    # They are read in other windows, so that sums differ in their last digits.
    for kind in ("with_memory", "ablated"):
        losses = (each[kind]["loss"] for each in (evaluated, expected))
        assert next(losses) == pytest.approx(next(losses), rel=1e-5)
    assert answered == expected_answers


def test_an_export_has_no_held_out_documents_and_no_steps(folder, capsys):
    assert cli.main(["evaluate", str(folder / "export")]) == 2
    assert "is an export, without held-out documents; name --documents" in capsys.readouterr().err
    assert cli.main(["generate", str(folder / "export"), "--prompt=a", "--step=9"]) == 2
    assert "is not a run with checkpoints" in capsys.readouterr().err


def test_tokenizer_of_an_export(tmp_path):
    write_checkpoint(tiny_config(tmp_path / "run", vocab_size=320))
    export = tmp_path / "export"
    command("convert", "to-safetensors", tmp_path / "run", export)
    config = export / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("tokenizer: bytes", ""))
    with pytest.raises(UserError, match="has no tokenizer that can be read; put its"):
        load_model(export)
    config.write_text(text.replace("tokenizer: bytes", "tokenizer: sentencepiece"))
    with pytest.raises(UserError, match=r"tokenizer.model: cannot be read \(No such file"):
        load_model(export)
    train_sentencepiece(iter([TEXT] * 9), 320, export / "tokenizer.model")
    assert load_model(export).tokenizer.vocab_size == 320


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(folder, tmp_path, capsys):
    export = tmp_path / "export"
    command("convert", "from-safetensors", folder / "export", export)
    config = export / "config.yaml"
    config.write_text(config.read_text().replace("tokenizer: bytes", "tokenizer: sentencepiece"))
    train_sentencepiece(iter([TEXT] * 9), 320, export / "tokenizer.model")
    with pytest.raises(UserError, match=r"tokenizer.model: the tokenizer has 320 ids, but the mo"):
        load_model(export)
    assert cli.main(["convert", "to-hf", str(export), str(tmp_path / "made")]) == 2
    assert "the tokenizer has 320 ids" in capsys.readouterr().err


def test_a_single_file_without_its_tokenizer_says_where_there_is_one(folder, tmp_path):
    config = tmp_path / "config.yaml"
    text = (folder / "export" / "config.yaml").read_text()
    config.write_text(text.replace("tokenizer: bytes", ""))
    shutil.copy(folder / "export" / "model.safetensors", tmp_path / "one.safetensors")
    with pytest.raises(UserError, match=r"one.safetensors: a single file carries no tokenizer"):
        load_model(tmp_path / "one.safetensors")


def test_a_directory_that_may_not_be_read_is_named(tmp_path, monkeypatch, capsys):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", refuse)  # as root, nothing is refused
    path = str(tmp_path)
    for given in (["generate", path, "--prompt=a"], ["convert", "to-hf", path, path + "x"]):
        assert cli.main(given) == 2
        assert capsys.readouterr().err == f"infini-ds: {path}: cannot be read (Permission denied)\n"
    with pytest.raises(UserError, match=r"inspect .*: cannot be read \(Permission denied\)"):
        describe(tmp_path)
