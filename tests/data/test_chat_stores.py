"""Stores of conversations: their weights, their template, and which settings make another store."""

import json

import pytest

from infini_ds.config import DataConfig, TokenizerConfig
from infini_ds.data import encoding
from infini_ds.data.prepare import prepare
from infini_ds.data.sentencepiece_tokenizer import train_sentencepiece
from infini_ds.data.store import Store
from infini_ds.errors import UserError
from infini_ds.runs.tokenizer import keep_tokenizer
from tests.data.chat_templates import CHATML, GENERATION, LLAMA3, turns
from tests.data.test_chat import model_of
from tests.data.tokenizer_files import SOURCE


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "chats.jsonl"
    chats = [turns(f"question {i} é?", f"answer {i}") for i in range(60)]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    tokenizer = TokenizerConfig(kind="tokenizers", model=str(model_of(tmp_path / "model", CHATML)))
    return DataConfig(
        source="files", files=[str(path)], messages_field="messages",
        store=str(tmp_path / "store"), held_out_fraction=0.1, tokenizer=tokenizer,
    )  # fmt: skip


def with_template(config, path, template):
    path.write_text(template)
    tokenizer = config.tokenizer.model_copy(update={"chat_template": str(path)})
    return config.model_copy(update={"tokenizer": tokenizer})


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_prepare_stores_the_assistants_turns_with_weight(config):
    store = prepare(config, workers=1)
    ids = {name: store.tokenizer.special_tokens[f"<|im_{name}|>"] for name in ("start", "end")}
    for name in ("train", "held_out"):
        split = store.split(name)
        assert split.weights is not None
        for document, length in enumerate(split.lengths):
            tokens = split.tokens(document, 0, int(length)).tolist()
            begin = split.offsets[document]
            weights = split.weights[begin : begin + length].tolist()
            assert tokens[0] == store.tokenizer.bos_id
            assert tokens[1] == tokens[tokens.index(ids["end"]) + 2] == ids["start"]
            answer = [i for i, weight in zip(tokens, weights, strict=True) if weight]
            assert store.tokenizer.decode(answer).startswith("answer ")
            assert answer[-3:] == [ids["end"], tokens[-2], store.tokenizer.eos_id]
            assert weights == sorted(weights)
    assert len(store.split("held_out").lengths) > 0


def test_prepare_writes_the_same_with_one_and_two_workers(config, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "_BATCH_DOCUMENTS", 16)
    for name, workers in (("one", 1), ("two", 2)):
        prepare(config.model_copy(update={"store": str(tmp_path / name)}), workers=workers)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_named_template_goes_with_the_tokenizer(config, tmp_path):
    config = with_template(config, tmp_path / "mine.jinja", GENERATION)
    store = prepare(config, workers=1)
    assert store.tokenizer.chat_template == GENERATION
    store = prepare(config, force=True, workers=1)  # the template is one of a store's files
    (tmp_path / "run").mkdir()
    keep_tokenizer(store.tokenizer, "tokenizers", tmp_path / "run")
    kept = tmp_path / "run" / "tokenizer" / "chat_template.jinja"
    assert kept.read_text() == GENERATION
    other = with_template(config, tmp_path / "mine.jinja", LLAMA3)
    keep_tokenizer(prepare(other, force=True).tokenizer, "tokenizers", tmp_path / "run")
    assert kept.read_text() == LLAMA3


def test_a_template_goes_with_a_sentencepiece_model(config, tmp_path):
    model = tmp_path / "a.model"
    train_sentencepiece(iter(SOURCE.split("\n")), 320, model)
    tokenizer = TokenizerConfig(model=str(model))
    config = config.model_copy(update={"tokenizer": tokenizer})
    template = "{{ bos_token }}" + CHATML.replace("<|im_end|>", "</s>")
    store = prepare(with_template(config, tmp_path / "mine.jinja", template), workers=1)
    assert store.tokenizer.chat_template == template
    tokens = store.split("train").tokens(0, 0, 1000).tolist()
    assert (tokens.count(store.tokenizer.bos_id), tokens.count(store.tokenizer.eos_id)) == (1, 2)


def test_store_open_refuses_a_store_of_another_template(config, tmp_path):
    prepare(config, workers=1)
    other = with_template(config, tmp_path / "mine.jinja", GENERATION)
    with pytest.raises(UserError, match=r"^data\.tokenizer\.chat_template is .*--force`$"):
        Store.open(config.store, other)
    # Where the same template lies does not matter.
    Store.open(config.store, with_template(config, tmp_path / "mine.jinja", CHATML))
    with pytest.raises(UserError, match=r"^data\.messages_field is 'chat', but"):
        Store.open(config.store, config.model_copy(update={"messages_field": "chat"}))
    with pytest.raises(UserError, match=r"^data\.text_field is 'text', but"):
        Store.open(config.store, config.model_copy(update={"messages_field": ""}))


def test_prepare_says_why_no_conversation_can_be_used(config, tmp_path):
    config = with_template(config, tmp_path / "mine.jinja", "{{ raise_exception('none') }}")
    says = r"no document with text \(60 skipped, the chat template refuses it \(none\): "
    with pytest.raises(UserError, match=says):
        prepare(config, workers=1)
    assert not (tmp_path / "store").exists()
