"""A run's weights as safetensors: the same numbers, whole files, and no file that is not whole."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from infini_ds import cli
from infini_ds.conversion import convert
from infini_ds.conversion.writer import Plan
from infini_ds.errors import UserError
from infini_ds.model.transformer import InfiniTransformer
from infini_ds.runs.checkpoint import load_run
from infini_ds.runs.export import load_export, load_model, open_model
from tests import tiny
from tests.evaluation.conftest import RUNS
from tests.tiny_run import write_manifest


def run(direction, source, target, *options) -> int:
    """What has no tokenizer here needs none."""
    given = [direction, source, target, "--without-tokenizer", *options]
    return cli.main(["convert", *map(str, given)])


def assert_same(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("size", ["5GB", "10KB"])
@pytest.mark.parametrize("dtype", RUNS)
def test_run_to_file_to_export_keeps_every_bit(saved, dtype, size, tmp_path):
    output = saved[dtype] / "output"
    expected = load_run(output)
    assert run("to-safetensors", output, tmp_path / "one.safetensors") == 0
    shards = ("--shard-size", size)
    assert run("from-safetensors", tmp_path / "one.safetensors", tmp_path / "export", *shards) == 0
    assert run("from-safetensors", tmp_path / "export", tmp_path / "again") == 0
    for path in ("one.safetensors", "export", "again"):
        model, config = load_export(tmp_path / path)
        assert config == expected.config.model
        assert_same(model.state_dict(), expected.model.state_dict())
    assert_same(load_file(tmp_path / "one.safetensors"), expected.model.state_dict())
    assert (tmp_path / "export" / "model.safetensors.index.json").exists() == (size == "10KB")


def test_the_step_can_be_chosen_and_an_export_has_none(saved, tmp_path, capsys):
    output = saved["bf16"] / "output"
    assert run("to-safetensors", output, tmp_path / "a", "--step", 1) == 0
    assert run("to-safetensors", output, tmp_path / "b", "--step", 7) == 2
    assert "has no checkpoint of step 7; there are: 1, 2" in capsys.readouterr().err
    assert run("to-safetensors", tmp_path / "a", tmp_path / "b", "--step", 1) == 2
    assert "is not a run with checkpoints" in capsys.readouterr().err


def test_another_dtype(saved, tmp_path):
    output = saved["fp32"] / "output"
    assert run("to-safetensors", output, tmp_path / "export", "--dtype", "bf16") == 0
    expected = load_run(output).model.to(torch.bfloat16)
    assert_same(load_export(tmp_path / "export")[0].state_dict(), expected.state_dict())


def masters_of(config) -> dict[str, torch.Tensor]:
    """What the optimizer of `saved` keeps: the weights that the engine was built with."""
    model = InfiniTransformer(config.model, seed=config.seed)
    return model.to(torch.bfloat16).float().state_dict()


def test_fp32_of_a_bf16_run_are_the_weights_of_its_optimizer(saved, tmp_path):
    output = saved["bf16"] / "output"
    assert run("to-safetensors", output, tmp_path / "export", "--dtype", "fp32") == 0
    expected = masters_of(load_run(output).config)
    assert_same(load_export(tmp_path / "export")[0].state_dict(), expected)


def test_fp32_of_what_is_not_trained_are_the_weights_that_the_run_computes_with(saved, tmp_path):
    checkpoint = shutil.copytree(
        saved["bf16"] / "output" / "checkpoints" / "step_00000002", tmp_path / "step_00000002"
    )
    tree = yaml.safe_load((checkpoint / "config.yaml").read_text())
    tree["optimizer"]["train"] = ["*.beta"]
    (checkpoint / "config.yaml").write_text(yaml.safe_dump(tree))
    (file,) = checkpoint.glob("*optim_states.pt")
    whole = torch.load(file, weights_only=False)
    for mapping in whole["optimizer_state_dict"]["param_slice_mappings"]:
        for name in [name for name in mapping if not name.endswith(".beta")]:
            del mapping[name]
    torch.save(whole, file)
    write_manifest(checkpoint)
    assert run("to-safetensors", checkpoint, tmp_path / "export", "--dtype", "fp32") == 0
    loaded = load_run(checkpoint)
    computed, masters = loaded.model.float().state_dict(), masters_of(loaded.config)
    expected = {n: masters[n] if n.endswith(".beta") else computed[n] for n in computed}
    assert_same(load_export(tmp_path / "export")[0].state_dict(), expected)


def test_shards_of_several_ranks_are_put_together(saved, tmp_path):
    """One rank's file cut in the middle of every group, as two ranks would have it."""
    checkpoint = shutil.copytree(
        saved["bf16"] / "output" / "checkpoints" / "step_00000002", tmp_path / "step_00000002"
    )
    (file,) = checkpoint.glob("*optim_states.pt")
    whole = torch.load(file, weights_only=False)
    state = whole["optimizer_state_dict"]
    groups, mappings = state["single_partition_of_fp32_groups"], state["param_slice_mappings"]
    for rank in range(2):
        parts, places = [], []
        for group, mapping in zip(groups, mappings, strict=True):
            middle = len(group) // 2
            begin, end = (0, middle) if rank == 0 else (middle, len(group))
            parts.append(group[begin:end].clone())
            places.append({})
            for name, place in mapping.items():
                low, high = max(place.start, begin), min(place.start + place.numel, end)
                if low < high:
                    places[-1][name] = type(place)(numel=high - low, start=low - begin)
        state |= {"single_partition_of_fp32_groups": parts, "param_slice_mappings": places}
        torch.save(whole, checkpoint / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    write_manifest(checkpoint)
    assert run("to-safetensors", checkpoint, tmp_path / "export", "--dtype", "fp32") == 0
    expected = masters_of(load_run(checkpoint).config)
    assert_same(load_export(tmp_path / "export")[0].state_dict(), expected)


def make_export(directory: Path) -> Path:
    """A model of the dtypes bf16 and fp32 mixed, with tensors of odd sizes."""
    config = tiny.model_config(
        vocab_size=11, hidden_size=5, num_heads=3, head_dim=2, intermediate_size=7
    )
    model = InfiniTransformer(config)
    directory.mkdir()
    state = {
        name: tensor.to(torch.bfloat16) if "norm" in name else tensor
        for name, tensor in model.state_dict().items()
    }
    save_file(state, directory / "model.safetensors")
    text = convert.config_text(config, None)
    (directory / "config.yaml").write_text(text)
    return directory


def test_mixed_dtypes_are_aligned_in_the_file(tmp_path):
    source = make_export(tmp_path / "source")
    assert run("from-safetensors", source, tmp_path / "export") == 0
    expected = load_file(source / "model.safetensors")
    with safe_open(tmp_path / "export" / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert_same(tensors, expected)
    for tensor in tensors.values():
        assert tensor.data_ptr() % tensor.itemsize == 0


def test_mixed_dtypes_do_not_compute(tmp_path, capsys):
    source = make_export(tmp_path / "source")
    message = "layers.0.weight is float32, layers.1.input_layernorm.weight bfloat16; make them one"
    with pytest.raises(UserError, match=message):
        load_export(source)
    assert run("to-hf", source, tmp_path / "made") == 2
    assert message in capsys.readouterr().err
    for direction in ("to-hf", "to-safetensors"):
        assert run(direction, source, tmp_path / direction, "--dtype", "bf16") == 0
        load_export(tmp_path / direction)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("target", ["export", "one.safetensors"])
def test_interruption_leaves_nothing(target, error, tmp_path, monkeypatch, capsys):
    source = make_export(tmp_path / "source")
    produce = Plan._produce

    def some(plan):
        items = produce(plan)
        for _ in range(3):
            yield next(items)
        assert len(list(tmp_path.glob(f".{target}.*.partial/{target}"))) == 1
        raise error

    monkeypatch.setattr(Plan, "_produce", some)
    code, told = (130, "interrupted") if error is KeyboardInterrupt else (2, "No space left on")
    assert run("to-safetensors", source, tmp_path / target) == code
    assert told in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["source"]
    # What a killed one leaves goes away with the next.
    monkeypatch.setattr(Plan, "_produce", produce)
    (tmp_path / f".{target}.abc.partial").mkdir()
    assert run("to-safetensors", source, tmp_path / target) == 0
    assert {file.name for file in tmp_path.iterdir()} == {"source", target}
    open_model(tmp_path / target)


@pytest.mark.parametrize("target", ["export", "one.safetensors"])
def test_nothing_is_overwritten_without_force(target, tmp_path, capsys):
    source = make_export(tmp_path / "source")
    assert run("to-safetensors", source, tmp_path / target) == 0
    assert run("to-safetensors", source, tmp_path / target) == 2
    assert f"{target}: exists; choose another destination or add --force" in capsys.readouterr().err
    assert run("to-safetensors", source, tmp_path / target, "--force") == 0


@pytest.mark.parametrize("target", ["export", "one.safetensors"])
@pytest.mark.parametrize("force", [False, True])
def test_two_to_one_destination_leave_one_that_is_whole(
    target, force, tmp_path, monkeypatch, capsys
):
    source = make_export(tmp_path / "source")
    options = ["--force"] if force else []
    produce, codes = Plan._produce, []

    def interrupted(plan):
        items = produce(plan)
        yield next(items)
        monkeypatch.setattr(Plan, "_produce", produce)
        codes.append(run("to-safetensors", source, tmp_path / target))
        yield from items

    monkeypatch.setattr(Plan, "_produce", interrupted)
    codes.append(run("to-safetensors", source, tmp_path / target, *options))
    assert codes == [0, 0 if force else 2]
    assert ("add --force" in capsys.readouterr().err) == (not force)
    assert open_model(tmp_path / target).config.hidden_size == 5
    assert {file.name for file in tmp_path.iterdir()} == {"source", target}


def test_force_replaces_neither_the_source_nor_something_else(tmp_path, capsys):
    source = make_export(tmp_path / "source")
    link = tmp_path / "linked" / "model.safetensors"
    link.parent.mkdir()
    link.symlink_to(source / "model.safetensors")
    shutil.copy(source / "config.yaml", link.parent)
    mistakes = [
        (source, source, "must not be the source itself or hold it"),
        (source, tmp_path, "must not be the source itself or hold it"),
        (source, source / "model.safetensors", "must not be the source itself or hold it"),
        (link.parent, source / "model.safetensors", "must not be the source itself or hold it"),
        (source, source / "new", "must not lie in the source"),
    ]
    for origin, target, message in mistakes:
        assert run("to-safetensors", origin, target, "--force") == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", ["letter.txt", "training.safetensors", "config.json"])
def test_force_replaces_no_directory_of_something_else(content, tmp_path, capsys):
    source = make_export(tmp_path / "source")
    other = tmp_path / "other"
    other.mkdir()
    (other / content).write_text("dear")
    if content == "letter.txt":
        (other / "model.safetensors").write_text("")
    assert run("to-safetensors", source, other, "--force") == 2
    assert "is no directory of weights, so it is not replaced" in capsys.readouterr().err
    assert (other / content).exists()
    letter = tmp_path / "letter.txt"
    letter.write_text("dear")
    for target in (letter, other.rename(tmp_path / "other.safetensors")):
        assert run("to-safetensors", source, target, "--force") == 2
        assert "so it is not replaced; remove it" in capsys.readouterr().err


def test_force_replaces_an_export_with_its_reports(tmp_path, monkeypatch):
    source, export = make_export(tmp_path / "source"), tmp_path / "export"
    for direction in ("to-hf", "to-safetensors", "to-hf"):
        assert run(direction, source, export, "--force", "--dtype", "fp32") == 0
        (export / "tensorboard" / "evaluate").mkdir(parents=True)
        (export / "evaluation.png").write_text("")
    monkeypatch.chdir(export)
    assert run("to-safetensors", source, ".", "--force", "--shard-size", "1KB") == 0
    assert (export / "model.safetensors.index.json").exists()
    assert not (export / "tensorboard").exists()
    assert run("to-safetensors", source, export, "--force") == 0


def test_nothing_is_written_into_a_run_and_a_run_with_weights_is_a_run(saved, tmp_path, capsys):
    output = shutil.copytree(saved["bf16"] / "output", tmp_path / "run")
    export = make_export(tmp_path / "export")
    checkpoint = output / "checkpoints" / "step_00000002"
    for origin in (output, export, checkpoint):
        for target in (output / "model.safetensors", output / "deep" / "made", checkpoint / "x"):
            assert run("to-safetensors", origin, target) == 2
            assert "must not lie in" in capsys.readouterr().err
    shutil.copy(export / "model.safetensors", output)
    assert load_model(output).step == open_model(output).settings.train.steps == 2


def test_a_run_may_be_named_as_a_step_and_a_checkpoint_by_its_place(saved, tmp_path, monkeypatch):
    for name in ("step_something", "step_3"):
        output = shutil.copytree(saved["bf16"] / "output", tmp_path / name)
        assert load_model(output).step == 2
        assert run("to-safetensors", output, tmp_path / f"{name}.safetensors") == 0
    monkeypatch.chdir(output / "checkpoints" / "step_00000001")
    assert load_model(".").step == 1
    assert run("to-safetensors", ".", tmp_path / "export") == 0


@pytest.mark.parametrize("target", ["export", "one.safetensors"])
def test_destination_is_where_a_link_leads(target, tmp_path):
    source = make_export(tmp_path / "source")
    place, link = tmp_path / "disk" / target, tmp_path / target
    link.symlink_to(place)
    for force in ([], ["--force"]):
        assert run("to-safetensors", source, link, *force) == 0
        assert link.readlink() == place
        open_model(place)
    assert list(place.parent.iterdir()) == [place]


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("x" * 300, "is too long a name"),
        ("source/config.yaml/export", "Not a directory|File exists"),
        ("made/" + "x" * 250, "File name too long"),
    ],
    ids=["name", "file_on_the_way", "name_beside_it"],
)
def test_what_the_file_system_refuses_is_one_line(target, told, tmp_path, capsys):
    source = make_export(tmp_path / "source")
    shutil.copy(source / "model.safetensors", tmp_path / "a.safetensors")
    shutil.copy(source / "config.yaml", tmp_path)
    assert run("from-safetensors", tmp_path / "a.safetensors", tmp_path / target) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(told, line)


def without_config(source: Path) -> None:
    (source / "config.yaml").unlink()


def other_config(source: Path) -> None:
    path = source / "config.yaml"
    path.write_text(path.read_text().replace("hidden_size: 5", "hidden_size: 6"))


def unknown_setting(source: Path) -> None:
    path = source / "config.yaml"
    path.write_text(path.read_text().replace("norm_eps", "norm_epps"))


def nested(source: Path) -> None:
    (source / "config.yaml").write_text("[" * 10_000)


def binary(source: Path) -> None:
    (source / "config.yaml").write_bytes(b"model: \xff")


MISTAKES = {
    "nested": (nested, "config.yaml: must be YAML with the key `model`"),
    "binary": (binary, "config.yaml: cannot be read ('utf-8' codec can't decode"),
    "no_config": (without_config, "has no config; put a config.yaml with the key `model` beside"),
    "other_config": (other_config, "has shape [11, 5], but config.yaml asks for [11, 6]"),
    "unknown": (unknown_setting, "unknown setting model.norm_epps; did you mean norm_eps?"),
    "no_weights": (lambda source: (source / "model.safetensors").unlink(), "is neither an export"),
    "no_source": (shutil.rmtree, "no such file or directory"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line(name, tmp_path, capsys):
    spoil, message = MISTAKES[name]
    source = make_export(tmp_path / "source")
    spoil(source)
    assert run("from-safetensors", source, tmp_path / "export") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(tmp_path.glob("export*"))


def test_shard_size_is_checked(tmp_path, capsys):
    assert run("from-safetensors", tmp_path, tmp_path / "x", "--shard-size", "5") == 2
    assert "--shard-size (5) must be a number with KB, MB or GB" in capsys.readouterr().err


def test_a_model_with_a_convolution_is_no_plain_model(saved, tmp_path, capsys):
    assert run("to-llama", saved["bf16"] / "output", tmp_path / "plain") == 2
    assert "model.memory.short_conv must be 0" in capsys.readouterr().err
    # Biases on queries, keys and values alone are those of Qwen2.
    assert run("to-llama", saved["fp32"] / "output", tmp_path / "plain") == 0
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(model).__name__ == "Qwen2ForCausalLM"
    tokens = load_file(saved["fp32"] / "reference.safetensors")["tokens"][:, :64]
    ours = load_run(saved["fp32"] / "output").model
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, ours(tokens).logits, rtol=1e-4, atol=1e-4)


def test_names_are_printed_as_they_are(tmp_path, capsys):
    target = tmp_path / "[red]x[" / "a[/y]"
    assert run("to-safetensors", make_export(tmp_path / "source"), target) == 0
    assert f"{target}: " in capsys.readouterr().out
