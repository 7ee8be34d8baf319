"""What is on disk is told, damage too, and what differs."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import save_file

from infini_ds import cli
from infini_ds.config import DataConfig, TokenizerConfig
from infini_ds.data.prepare import prepare
from infini_ds.inspection.weights import parameter_counts
from infini_ds.memory import RULES
from infini_ds.model.layers import count_parameters
from infini_ds.runs.checkpoint import load_run
from tests.damage import flip
from tests.tiny_run import tiny_config, write_checkpoint

torch.set_num_threads(1)

WRITING = {"write_gate": True, "write_gate_sees_keys": True, "short_conv": True}


@pytest.fixture
def run(tmp_path):
    """A run of two checkpoints, 5 and 9."""
    config = tiny_config(tmp_path / "run", memory=WRITING, gate_init=math.log(3))
    write_checkpoint(config, 5, seed=1)
    write_checkpoint(config, 9)
    return tmp_path / "run"


def checkpoint(run, step):
    return run / "checkpoints" / f"step_{step:08d}"


def inspect(capsys, *arguments, code=0):
    """What it prints, and the figures."""
    file = arguments[0].parent / "figures.json"
    assert cli.main(["inspect", *map(str, arguments), "--json", str(file)]) == code
    return capsys.readouterr().out, json.loads(file.read_text())


def test_checkpoint_is_described(run, capsys):
    shown, figures = inspect(capsys, checkpoint(run, 9))
    assert (figures["kind"], figures["step"], figures["tokens"]) == ("checkpoint", 9, 900)
    assert figures["layout"] == {"pipeline": 2, "data": 1}
    assert figures["problems"] == []
    assert figures["gates"] == [pytest.approx([0.75, 0.75])] * 2
    sizes = figures["bytes"]
    files = [file for file in checkpoint(run, 9).rglob("*") if file.is_file()]
    assert sizes["total"] == sum(file.stat().st_size for file in files)
    assert 0 < sizes["memories"] < sizes["weights"]
    assert sizes["optimizer"] == 81
    for words in (
        "2 pipeline stages x 1 data-parallel", "write_gate, short_conv", "vocabulary 258",
        "0.750 0.750", "valid", f"{figures['parameters']['total']:,}",
    ):  # fmt: skip
        assert words in shown


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_of_the_parts_are_all_there_are(tmp_path, tied):
    model = tiny_config(tmp_path, memory=WRITING, tie_embeddings=tied, qk_norm=True).model
    counts = parameter_counts(model)
    total = counts.pop("total")
    assert total == sum(counts.values()) == count_parameters(model)
    assert counts["embedding"] == 258 * 16
    assert counts.get("head") == (None if tied else 258 * 16)
    assert counts["gates"] == 4
    assert counts["norms"] == 5 * 16 + 2 * 2 * 8
    assert counts["feed-forward"] > counts["write gates"] > 0
    assert counts["short convolutions"] > 0


@pytest.mark.parametrize("name", ["layer_01-model_states.pt", "config.yaml", "state.json"])
def test_flipped_byte_is_told(run, capsys, name):
    flip(checkpoint(run, 9) / name)
    shown, figures = inspect(capsys, checkpoint(run, 9))
    problem = f"{name} does not have its checksum"
    assert problem in figures["problems"]
    assert problem in shown
    assert (figures["gates"] is None) == name.startswith("layer")
    shown, figures = inspect(capsys, run)
    assert figures["checkpoints"]["step_00000009"] == [problem]
    assert figures["newest_valid"]["step"] == 5
    assert problem in shown


def test_unfinished_and_cut_checkpoints_are_told(run, capsys):
    (checkpoint(run, 9) / "manifest.json").unlink()
    (checkpoint(run, 5) / "layer_00-model_states.pt").write_bytes(b"")
    (checkpoint(run, 5) / "state.json").unlink()
    _, figures = inspect(capsys, run)
    assert figures["newest_valid"] is None
    assert figures["checkpoints"]["step_00000009"] == ["it was not finished (no manifest.json)"]
    cut, missing = figures["checkpoints"]["step_00000005"]
    assert cut.startswith("layer_00-model_states.pt has 0 bytes, not ")
    assert missing == "state.json is missing"
    shown, _ = inspect(capsys, checkpoint(run, 9))
    assert "it was not finished" in shown


@pytest.mark.parametrize("files", ["[]", '{"state.json": {}}', "[" * 100_000, "{}"])
def test_a_valid_checkpoint_before_a_malformed_manifest_is_used(run, capsys, files):
    (checkpoint(run, 9) / "manifest.json").write_text(f'{{"format": 1, "files": {files}}}')
    assert load_run(run).step == 5
    _, figures = inspect(capsys, checkpoint(run, 9))
    assert figures["gates"] is None
    assert cli.main(["inspect", str(run)]) == 0


def test_store_is_described_and_its_flipped_byte_told(tmp_path, capsys):
    (tmp_path / "corpus.txt").write_text("words of a document")
    config = DataConfig(
        source="files", files=[str(tmp_path / "corpus.txt")], store=str(tmp_path / "store"),
        held_out_fraction=0.0, tokenizer=TokenizerConfig(kind="bytes"),
    )  # fmt: skip
    prepare(config, workers=1)
    shown, figures = inspect(capsys, tmp_path / "store")
    assert figures["kind"] == "store"
    assert figures["splits"]["train"]["tokens"] == 21
    assert figures["problems"] == []
    assert "1 documents, 21 tokens, 19 bytes" in shown
    shutil.copytree(tmp_path / "store", tmp_path / "spoilt")
    flip(tmp_path / "spoilt" / "train.tokens")
    shown, figures = inspect(capsys, tmp_path / "spoilt", "--diff", tmp_path / "store")
    assert figures["problems"] == ["train.tokens does not have its checksum"]
    assert figures["difference"] == {"settings": {}, "changes": None}
    assert "no setting differs" in shown


@pytest.mark.parametrize("rule", RULES)
def test_memory_file_is_described(run, capsys, rule):
    model = write_checkpoint(tiny_config(run.parent / "other", memory_rule=rule))
    path = run.parent / "book.safetensors"
    model(torch.zeros(1, 37, dtype=torch.int64)).memory.save(path, "f" * 64)
    shown, figures = inspect(capsys, path)
    assert figures["kind"] == "memory"
    assert figures["settings"]["segment_length"] == 32
    assert figures["settings"]["memory_rule"] == rule
    assert (figures["open_tokens"], figures["fingerprint"]) == ([5], "f" * 64)
    assert len(figures["norms"]) == 2
    assert figures["settings"]["memory_layers"] == "all"
    assert "f" * 30 in shown  # and the rest in the next line


def test_layers_that_have_a_memory_are_told(tmp_path, capsys):
    model = write_checkpoint(tiny_config(tmp_path / "run", memory={"layers": [1]}), 5)
    shown, figures = inspect(capsys, checkpoint(tmp_path / "run", 5))
    assert "linear rule, in layers [1]" in shown
    assert figures["gates"][0] == [0, 0]
    assert figures["gates"][1] == [0.5, 0.5]
    path = tmp_path / "book.safetensors"
    model(torch.zeros(1, 37, dtype=torch.int64)).memory.save(path)
    _, figures = inspect(capsys, path)
    assert figures["settings"]["memory_layers"] == [1]
    assert figures["norms"][0] == 0 < figures["norms"][1]


@pytest.mark.parametrize("name", ["export", "one.safetensors"])
def test_export_is_described(run, capsys, name):
    export, other = run.parent / name, run.parent / f"other_{name}"
    for made, step in ((export, "9"), (other, "5")):
        assert cli.main(["convert", "to-safetensors", str(run), str(made), "--step", step]) == 0
    shown, figures = inspect(capsys, export)
    assert figures["kind"] == "export"
    assert figures["settings"]["model"]["hidden_size"] == 16
    assert figures["settings"]["tokenizer"] == "bytes, 258 ids"
    assert figures["settings"]["dtype"] == "float32"
    assert figures["gates"] == [pytest.approx([0.75, 0.75])] * 2
    assert figures["bytes"]["total"] > 4 * figures["parameters"]["total"]
    for words in ("write_gate, short_conv", "bytes, 258 ids", "0.750 0.750", "32 tokens"):
        assert words in shown
    _, figures = inspect(capsys, export, "--diff", other)
    assert figures["difference"]["settings"] == {}
    assert figures["difference"]["changes"]["attention"] == pytest.approx(math.sqrt(2), rel=0.1)


def test_weights_without_a_config_are_told(tmp_path, capsys):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    assert cli.main(["inspect", str(tmp_path / "a.safetensors")]) == 2
    assert "a.safetensors: has no config; put a config.yaml" in capsys.readouterr().err


def test_difference_of_two_checkpoints(run, capsys, tmp_path):
    shown, figures = inspect(capsys, checkpoint(run, 5), "--diff", run)
    found = figures["difference"]
    assert found["settings"] == {"step": [5, 9], "tokens": [500, 900]}
    changes = found["changes"]
    assert changes["attention"] == pytest.approx(math.sqrt(2), rel=0.1)  # drawn anew
    assert changes["gates"] == changes["norms"] == 0
    assert "141" in shown

    write_checkpoint(tiny_config(tmp_path / "wide", hidden_size=24))
    shown, figures = inspect(capsys, run, "--diff", tmp_path / "wide")
    found = figures["difference"]
    assert found["changes"] is None
    assert found["settings"]["model.hidden_size"] == [16, 24]
    assert found["settings"]["model.memory.write_gate"] == [True, False]
    assert "model.hidden_size" in shown


def test_change_of_what_was_zero_has_no_size(tmp_path, capsys):
    for name, gate in (("a", 0.0), ("b", 1.0)):
        write_checkpoint(tiny_config(tmp_path / name, gate_init=gate))
    shown, figures = inspect(capsys, tmp_path / "a", "--diff", tmp_path / "b")
    assert figures["difference"]["changes"]["gates"] is None
    assert figures["difference"]["changes"]["head"] == 0
    assert "from 0" in shown


MISTAKES = {
    "nothing": (["{run}/none"], "inspect {run}/none: no such file or directory"),
    "directory": (["{run}/checkpoints"], "is not a run, checkpoint, export, store or memory file"),
    "file": (["{run}/checkpoints/step_00000009/config.yaml"], "config.yaml: cannot be read"),
    "no_other": (["{run}", "--diff={run}/none"], "inspect {run}/none: no such file or directory"),
    "kinds": (["{run}", "--diff={book}"], "step_00000009 (checkpoint) and {book} (memory) must be"),
    "json": (["{run}", "--json={run}/a/b"], "--json {run}/a/b: its directory does not exist"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line_with_code_2(run, capsys, name):
    book = run.parent / "book.safetensors"
    model = write_checkpoint(tiny_config(run.parent / "other"))
    model(torch.zeros(1, 3, dtype=torch.int64)).memory.save(book)
    given, message = MISTAKES[name]
    assert cli.main(["inspect", *(each.format(run=run, book=book) for each in given)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert message.format(run=run, book=book) in line


def test_names_are_shown_as_they_are(tmp_path, capsys):
    strange = tmp_path / "[bold]x[" / "b] :smile:"
    write_checkpoint(tiny_config(strange, memory=WRITING))
    assert f"checkpoint {checkpoint(strange, 9)}" in inspect(capsys, strange)[0].replace("\n", "")
