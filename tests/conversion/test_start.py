"""A run begins with the weights of an export, in any layout, and only with its own settings."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from infini_ds import cli
from infini_ds import config as configuration
from infini_ds.config import DataConfig
from infini_ds.conversion.convert import config_text
from infini_ds.data.mixture import Mixture
from infini_ds.data.opening import with_vocabulary
from infini_ds.errors import UserError
from infini_ds.model.head import token_losses
from infini_ds.model.memory import Memory
from infini_ds.model.transformer import InfiniTransformer
from infini_ds.runs.export import load_export
from infini_ds.training.start import open_start
from tests import tiny
from tests.distributed.conftest import Run, data  # noqa: F401, a fixture
from tests.distributed.layout_worker import LENGTH, windows_of
from tests.distributed.processes import start_ranks
from tests.tiny_run import tiny_config, write_checkpoint

WORKER = Path(__file__).with_name("start_worker.py")
BYTES_AND_SPECIAL = 258


def make_llama(directory: Path, tied: bool) -> Path:
    """An export of a plain model of four layers, with random weights that are no bf16 numbers."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=BYTES_AND_SPECIAL, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        tie_word_embeddings=tied, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(1)
    plain = directory / f"plain_{tied}"
    transformers.LlamaForCausalLM(config).save_pretrained(plain, max_shard_size="20KB")
    export = directory / f"export_{tied}"
    arguments = ["convert", "from-llama", plain, export, "--without-tokenizer"]
    arguments += ["--segment-length", LENGTH]
    arguments += ["--gate-init", 0.5, "--memory-rule", "delta"]
    assert cli.main(list(map(str, arguments))) == 0
    return export


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """By whether the embeddings are tied."""
    folder = tmp_path_factory.mktemp("llama")
    made = {}

    def of(tied: bool) -> Path:
        if tied not in made:
            made[tied] = make_llama(folder, tied)
        return made[tied]

    return of


def run_from(export: Path, folder: Path, data: DataConfig, **settings) -> Run:  # noqa: F811
    run = Run(folder, data, train__steps=5, optimizer__learning_rate=1e-3, **settings)
    tree = yaml.safe_load(run.config.read_text())
    del tree["model"]
    run.config.write_text(yaml.safe_dump({"init_from": str(export), **tree}))
    return run


def test_what_the_config_leaves_out_is_the_exports(tmp_path):
    model = tiny.model_config(vocab_size=BYTES_AND_SPECIAL, memory={"write_gate": True})
    (tmp_path / "config.yaml").write_text(config_text(model, "sentencepiece"))
    run = {"output_dir": "o", "init_from": str(tmp_path), "data": {"store": "s"}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**run, "train": {"steps": 1, "batch_size": 1}}))
    config = configuration.load(path, ["model.memory.write_penalty=0.5", "model.num_layers=3"])
    memory = configuration.MemoryConfig(write_gate=True, write_penalty=0.5)
    assert config.model == model.model_copy(update={"num_layers": 3, "memory": memory})
    assert config.data.tokenizer.model == str(tmp_path / "tokenizer.model")
    chats = configuration.load(path, ["data.tokenizer.chat_template=chat.jinja"])
    template = {"chat_template": "chat.jinja"}
    assert chats.data.tokenizer == config.data.tokenizer.model_copy(update=template)
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"init_from .*: its config.yaml cannot be read"):
        configuration.load(path)
    path.write_text(configuration.dump(config))  # a checkpoint's: the export is needed no longer
    assert configuration.load(path) == config


MISTAKES = {
    "setting": (
        ["model.norm_eps=1e-3"], {}, r"model.norm_eps \(0.001\) must be 1e-06, as in init_from",
    ),
    "memory": (
        ["model.memory.short_conv=true"], {},
        r"model.memory.short_conv \(4\) must be 0, as in init_from",
    ),
    "vocabulary": (["model.vocab_size=300"], {}, r"model.vocab_size \(300\) must be 258"),
    "no_export": (["init_from=nowhere"], {"model": True}, "nowhere: no such file or directory"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_what_differs_is_named(name, export, tmp_path, data):  # noqa: F811
    overrides, options, message = MISTAKES[name]
    run = run_from(export(False), tmp_path, data)
    if options.get("model"):
        config = configuration.load(run.config)
        run.config.write_text(configuration.dump(config))
    config = configuration.load(run.config, overrides)
    with pytest.raises(UserError, match=message) as raised:
        open_start(config, Mixture.open(data))
    assert "\n" not in str(raised.value)


def test_a_run_is_no_export(tmp_path, data):  # noqa: F811
    config = tiny_config(tmp_path / "other")
    write_checkpoint(config)
    (tmp_path / "other" / "config.yaml").write_text(configuration.dump(config))
    run = run_from(tmp_path / "other", tmp_path / "run", data)
    with pytest.raises(UserError, match="is a run; make an export of it with `infini-ds convert"):
        open_start(configuration.load(run.config), Mixture.open(data))


def test_vocabulary_and_tokenizer_are_those_of_the_store(export, tmp_path, data):  # noqa: F811
    store = Mixture.open(data)
    made = {}
    for name, vocabulary in (("larger", 300), ("same", 258)):
        model = tiny.model_config(vocab_size=vocabulary)
        made[name] = tmp_path / name
        made[name].mkdir()
        save_file(InfiniTransformer(model).state_dict(), made[name] / "model.safetensors")

        def write(kind, name=name, model=model):
            (made[name] / "config.yaml").write_text(config_text(model, kind))

        write(None)
        run = run_from(made[name], tmp_path / f"run_{name}", data)
        config = with_vocabulary(configuration.load(run.config), store)
        if name == "same":
            assert open_start(config, store)
        else:
            message = "has 258 tokens, but init_from .* has 300, and no tokenizer"
            with pytest.raises(UserError, match=message):
                open_start(config, store)
            write("bytes")
            assert open_start(config, store)


CASES = {
    1: {"": {}},
    2: {
        "": {"parallel.pipeline_stages": 2},
        "data2": {"parallel.pipeline_stages": 1, "train.micro_batch_size": 2},
        "bf16_pipeline2": {"train.dtype": "bf16", "parallel.pipeline_stages": 2},
        "bf16_data2": {"train.dtype": "bf16", "parallel.pipeline_stages": 1},
        "zero2": {"parallel.zero_stage": 2, "train.micro_batch_size": 2},
        "zero3": {"parallel.zero_stage": 3, "train.micro_batch_size": 2},
        "bf16_zero3": {"train.dtype": "bf16", "parallel.zero_stage": 3},
        "bf16_without_zero": {"train.dtype": "bf16", "parallel.zero_stage": 0},
        "bf16_offloaded": {"train.dtype": "bf16", "parallel.offload_optimizer": True},
    },
    4: {"": {"parallel.pipeline_stages": 4}},
}


@pytest.fixture(scope="module")
def started(export, tmp_path_factory) -> dict[str, list[dict]]:
    """What every rank of every case made, by processes, name of the case and tying."""
    results = {}
    for world, cases in CASES.items():
        folder = tmp_path_factory.mktemp(f"world{world}")
        given = {}
        for name, case in cases.items():
            for tied in (True,) if "train.dtype" in case else (False, True):
                key = f"{world}{name}_{'tied' if tied else 'untied'}"
                given[key] = {"init_from": str(export(tied)), **case}
        path = folder / "cases.json"
        path.write_text(json.dumps(given))
        script = [str(WORKER), str(path), str(folder)]
        with start_ranks(script, world, folder / "logs") as ranks:
            assert not any(ranks.wait(580, together=True)), ranks.outputs()
        for name in given:
            files = [folder / f"{name}.{rank}.json" for rank in range(world)]
            results[name] = [json.loads(file.read_text()) for file in files]
    return results


@pytest.mark.slow
def test_imported_llama_trains_on_alike_in_every_layout(started, export):
    for tied in ("untied", "tied"):
        expected = started[f"1_{tied}"][0]["losses"]
        for name in ("2", "2data2", "2zero2", "2zero3", "4"):
            for rank in started[f"{name}_{tied}"]:
                assert rank["losses"] == pytest.approx(expected, rel=1e-5), name
        model, config = load_export(export(tied == "tied"))
        windows, count = windows_of(0)
        memory = Memory.empty(config, 4).layers()
        with torch.no_grad():
            hidden, _, _ = model.read_window(windows.tokens, windows.layout, memory)
            first = token_losses(hidden, *model.head(), windows.labels, 1024).sum() / count
        assert expected[0] == pytest.approx(float(first), rel=1e-5)
        assert expected[-1] != expected[0]


@pytest.mark.slow
def test_optimizer_starts_with_the_weights_in_full(started):
    assert {rank["stage"] for rank in started["4_tied"]} == {0, 1, 2, 3}
    for name, ranks in started.items():
        assert [rank["wrong"] for rank in ranks] == [[]] * len(ranks), name


@pytest.mark.slow
def test_resumed_run_needs_no_export(export, tmp_path, data):  # noqa: F811
    moved = export(False).rename(tmp_path / "moved")
    run = run_from(moved, tmp_path / "run", data, train__dtype="fp32", train__save_every=2)
    run.finish(1, "train.steps=2")
    before = run.losses
    config = configuration.load(run.config)
    run.config.write_text(configuration.dump(config))
    moved.rename(export(False))
    output = run.finish(1)
    assert "at step 2\n" in output
    assert sorted(run.losses) == [1, 2, 3, 4, 5]
    assert {step: run.losses[step] for step in before} == before
