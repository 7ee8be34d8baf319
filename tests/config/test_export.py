"""The config.yaml of an export: a model, and the kind of its tokenizer."""

from pathlib import Path

import pytest
import yaml

from infini_ds.config import ModelConfig, parse_export
from infini_ds.errors import UserError
from infini_ds.runs.export import config_text

MODEL = ModelConfig(vocab_size=258, hidden_size=8, num_layers=1, num_heads=1, norm_eps=1e-6)
FILES = {
    None: "",
    "bytes": "",
    "sentencepiece": "exports/a/tokenizer.model",
    "tokenizers": "exports/a/tokenizer.json",
}


def text_of(**changes) -> str:
    return yaml.safe_dump({"model": MODEL.model_dump()} | changes)


@pytest.mark.parametrize("kind", FILES, ids=str)
def test_it_is_what_was_written(kind):
    config = parse_export(config_text(MODEL, kind), "of a test", Path("exports/a"))
    assert (config.model, config.tokenizer) == (MODEL, kind)
    assert config.tokenizer_file == FILES[kind]


def test_a_path_is_not_read_a_second_time():
    """The directory of an export may be named like a home directory or a variable."""
    config = parse_export(config_text(MODEL, "tokenizers"), "of a test", Path("~/$A"))
    assert config.tokenizer_file == "~/$A/tokenizer.json"


def test_other_keys_are_left_alone():
    text = text_of(directory="elsewhere", train={"steps": "many"}, note="from a friend")
    assert parse_export(text, "of a test", Path("here")).directory == "here"


def test_numbers_are_read_as_in_a_run_s_file():
    text = "model: {vocab_size: 258, hidden_size: 8, num_layers: 1, num_heads: 1, norm_eps: 1e-6}"
    assert parse_export(text, "of a test", Path("a")).model == MODEL


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "must be YAML with the key `model`"),
        ("- 1", "must be YAML with the key `model`"),
        ("tokenizer: bytes", "must be YAML with the key `model`"),
        ("model: 3", "model: input should be a valid dictionary"),
        ("model:", "model.hidden_size is required"),
        (text_of(tokenizer="words"), "tokenizer: input should be 'sentencepiece', 'tokenizers' or"),
        (text_of(model=MODEL.model_dump() | {"vocab_size": 0}), "model.vocab_size must be given"),
        (text_of(model=MODEL.model_dump() | {"head_dim": 0}), "model: head_dim (0) must be from 1"),
        (
            text_of(model=MODEL.model_dump() | {"norm_epps": 1}),
            "unknown setting model.norm_epps; did you mean norm_eps?",
        ),
    ],
    ids=[
        "broken_yaml", "a_list", "no_model", "a_number", "empty", "tokenizer", "vocabulary",
        "range", "unknown",
    ],
)  # fmt: skip
def test_a_mistake_is_told_in_one_line(text, message):
    with pytest.raises(UserError) as caught:
        parse_export(text, "exports/a/config.yaml", Path("exports/a"))
    told = str(caught.value)
    assert told.startswith(f"config exports/a/config.yaml: {message}")
    assert "\n" not in told
