"""The tokenizer of a plain model goes with it: into an export, a store, a run, and out again."""

import json

import pytest
import torch
import yaml

from infini_ds import cli
from infini_ds import config as configuration
from infini_ds.data.mixture import Mixture
from infini_ds.data.opening import with_vocabulary
from infini_ds.data.prepare import prepare
from infini_ds.data.store import Store
from infini_ds.data.tokenizer import load_tokenizer
from infini_ds.data.tokenizer_base import SPACE_MARK
from infini_ds.runs.export import load_model
from infini_ds.training.start import open_start
from tests.data.test_tokenizer import TEXTS
from tests.data.tokenizer_files import SPECIAL, byte_level, sentencepiece_like, write_byte_level
from tests.tiny_run import write_checkpoint

TEXT = "def function_123(first, second):\n    <think> 漢字  é\n"


def make_plain(directory, vocab_size=512):
    """A plain model with more ids than its tokenizer, whose BOS is in config.json alone.

    Its texts end at more tokens than its tokenizer says.
    """
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=64,
        bos_token_id=400, eos_token_id=[402, 403], tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(config).save_pretrained(directory)
    write_byte_level(directory)
    settings = directory / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"bos_token": None}))
    return directory


def convert(*arguments):
    assert cli.main(["convert", *map(str, arguments)]) == 0


@pytest.fixture
def export(tmp_path):
    convert(
        "from-llama", make_plain(tmp_path / "plain"), tmp_path / "export", "--segment-length=32"
    )
    return tmp_path / "export"


@pytest.fixture
def run(export, tmp_path):
    """The config of a run that goes on from the export, with a store and a checkpoint."""
    (tmp_path / "book.txt").write_text(TEXT * 50)
    tree = {
        "output_dir": str(tmp_path / "run"),
        "init_from": str(export),
        "data": {
            "source": "files", "files": [str(tmp_path / "*.txt")], "store": str(tmp_path / "store"),
            "held_out_fraction": 0.0,
        },
        "train": {"steps": 9, "batch_size": 1, "dtype": "fp32"},
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    config = configuration.load(path)
    prepare(config.data, workers=1)
    data = Mixture.open(config.data)
    config = with_vocabulary(config, data)
    open_start(config, data)
    write_checkpoint(config, store=data.fingerprint)
    return config


def of_transformers(directory, text):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, trust_remote_code=True)(text).input_ids


def test_ids_in_an_export_a_store_and_a_run_are_those_of_transformers(export, run, capsys):
    expected = of_transformers(export.parent / "plain", TEXT)
    assert yaml.safe_load((export / "config.yaml").read_text())["tokenizer"] == "tokenizers"
    for model in (export, run.output_dir):
        tokenizer = load_model(model).tokenizer
        assert [tokenizer.bos_id, *tokenizer.encode(TEXT)] == expected
        assert (tokenizer.bos_id, tokenizer.eos_id) == (400, 401)
        assert tokenizer.eos_ids == [401, 402, 403]
        command = ["generate", str(model), "--prompt", TEXT, "--max-new-tokens=3", "--seed=0"]
        assert cli.main(command) == 0
    stored = Store.open(run.data.store).split("train").tokens(0, 0, len(expected))
    assert stored.tolist() == expected
    assert run.data.tokenizer.model == str(export / "tokenizer.json")


@pytest.mark.parametrize("of", ["export", "run"])
def test_it_goes_out_again_with_its_settings(of, export, run, tmp_path):
    from transformers import AutoConfig, GenerationConfig

    plain = tmp_path / "plain"
    expected = of_transformers(plain, TEXT)
    for direction in ("to-hf", "to-llama"):
        target = tmp_path / direction
        convert(direction, export if of == "export" else run.output_dir, target)
        assert of_transformers(target, TEXT) == expected
        assert (target / "tokenizer.json").read_bytes() == (plain / "tokenizer.json").read_bytes()
        settings = json.loads((target / "tokenizer_config.json").read_text())
        assert settings["chat_template"] == "{{ messages }}"
        assert settings["bos_token"] == SPECIAL[0]
    hf = tmp_path / "to-hf"
    ends = {"bos_token_id": 400, "eos_token_id": [401, 402, 403]}
    for name in ("config.json", "generation_config.json"):
        tree = json.loads((hf / name).read_text())
        assert {key: tree[key] for key in ends} == ends
    back = AutoConfig.from_pretrained(tmp_path / "to-llama").eos_token_id
    back += GenerationConfig.from_pretrained(tmp_path / "to-llama").eos_token_id
    assert set(back) >= {402, 403}, "as of the plain model"
    assert not (tmp_path / "to-hf" / "tokenization_infini.py").exists()
    assert "BOS (id 400)" in (tmp_path / "to-hf" / "README.md").read_text()


def test_transformers_takes_the_file_whatever_class_it_was_of(tmp_path):
    plain = make_plain(tmp_path / "plain")
    expected = of_transformers(plain, TEXT)
    settings = plain / "tokenizer_config.json"
    # A class with a splitting of its own.
    settings.write_text(settings.read_text().replace("PreTrainedTokenizerFast", "Qwen2Tokenizer"))
    assert of_transformers(plain, TEXT) != expected
    convert("from-llama", plain, tmp_path / "export", "--segment-length=32")
    convert("to-hf", tmp_path / "export", tmp_path / "made")
    assert of_transformers(tmp_path / "made", TEXT) == expected


@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "LlamaTokenizer"])
def test_ids_are_those_of_the_classes_of_transformers(kind, tmp_path):
    import transformers

    made = byte_level() if kind == "Qwen2Tokenizer" else sentencepiece_like()
    model = json.loads(made.to_str())["model"]
    theirs = getattr(transformers, kind)(
        vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]]
    )
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(f'{{"bos_token_id": {theirs.eos_token_id}}}')
    ours = load_tokenizer("tokenizers", tmp_path / "tokenizer.json")
    for text in TEXTS.values():
        expected = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        if kind == "LlamaTokenizer" and SPACE_MARK in text:  # which becomes a space there
            assert ours.decode(ours.encode(text)) == f" {text}"
        else:
            assert ours.encode(text) == expected
    assert ours.eos_id == theirs.eos_token_id


def test_one_with_more_tokens_than_the_model_is_told(tmp_path, capsys):
    plain = make_plain(tmp_path / "plain", vocab_size=403)
    convert("from-llama", plain, tmp_path / "export", "--without-tokenizer")
    assert "tokenizer.json has 404 tokens, the model 403" in capsys.readouterr().out
    assert "tokenizer" not in yaml.safe_load((tmp_path / "export" / "config.yaml").read_text())
