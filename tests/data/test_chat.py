"""Conversations become the text, tokens and weights that transformers has for them."""

import json

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from infini_ds.config import DataConfig, TokenizerConfig
from infini_ds.conversion.hf.tokenization_infini import InfiniTokenizer
from infini_ds.data.documents import Corpus
from infini_ds.data.encoding import encode_rendered
from infini_ds.data.sentencepiece_tokenizer import train_sentencepiece
from infini_ds.data.tokenizer import configured_tokenizer, load_tokenizer
from infini_ds.errors import UserError
from tests.data.chat_templates import CHATML, GENERATION, LLAMA3, TEMPLATES, TOKENS, turns
from tests.data.tokenizer_files import SOURCE, byte_level, sentencepiece_like

CHAT = turns("def é?  ", "return 漢 🎉 first", "and second", "  def f(x):\n")
KINDS = {"byte_level": byte_level, "sentencepiece_like": sentencepiece_like}


def model_of(folder, template="", make=byte_level, **settings):
    """Writes a tokenizer with the tokens of the templates; its tokenizer.json."""
    folder.mkdir(exist_ok=True)
    tokenizer = make()
    tokenizer.add_special_tokens(TOKENS)
    tokenizer.save(str(folder / "tokenizer.json"))
    tree = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    tree |= {"chat_template": template} if template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(tree | settings))
    return folder / "tokenizer.json"


def corpus_of(folder, model, *records, field="messages", **settings):
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": record}) + "\n" for record in records))
    tokenizer = TokenizerConfig(kind="tokenizers", model=str(model), **settings)
    return Corpus(
        DataConfig(
            source="files", files=[str(path)], messages_field=field, store="", tokenizer=tokenizer
        )
    )


def learnt(document):
    """The parts of a document that have weight."""
    begin, parts = 0, []
    for characters, weight in document.spans:
        if weight:
            parts.append(document.text[begin : begin + characters])
        begin += characters
    assert begin == len(document.text)
    return parts


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_text_and_tokens_are_those_of_transformers(tmp_path, make, template):
    model = model_of(tmp_path, template, make)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = load_tokenizer("tokenizers", model)
    chats = [CHAT, CHAT[:2], turns("<0x41> ▁ a", " \n b\t")]
    for document, messages in zip(corpus_of(tmp_path, model, *chats), chats, strict=True):
        text = theirs.apply_chat_template(messages, tokenize=False)
        # White space behind EOS is left out, since EOS ends a document.
        text = text.rstrip() if text.rstrip().endswith("</s>") else text
        assert document.text == text
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        encoded = encode_rendered(tokenizer, document.text, document.spans)
        bos, eos = [tokenizer.bos_id], [tokenizer.eos_id]
        assert encoded.tokens.tolist() == (
            bos * (ids[:1] != bos) + ids + eos * (ids[-1:] != eos)
        )  # neither is there twice
        assert encoded.weights is not None
        assert len(encoded.weights) == len(encoded.tokens)
        assert encoded.weights[0] == 0


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_weights_are_the_mask_of_transformers_where_the_template_marks_turns(tmp_path, make):
    model = model_of(tmp_path, GENERATION, make)
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        CHAT, return_dict=True, return_assistant_tokens_mask=True
    )
    (document,) = corpus_of(tmp_path, model, CHAT)
    encoded = encode_rendered(load_tokenizer("tokenizers", model), document.text, document.spans)
    assert encoded.tokens[:-1].tolist() == theirs["input_ids"]
    assert encoded.weights.tolist() == [*theirs["assistant_masks"], 0]
    assert sum(theirs["assistant_masks"]) > 20


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("chatml", ["return 漢 🎉 first<|im_end|>\n", "  def f(x):\n<|im_end|>\n"]),
        ("llama3", ["return 漢 🎉 first<|eot_id|>", "def f(x):<|eot_id|>"]),
        ("zephyr", ["return 漢 🎉 first</s>\n", "  def f(x):\n</s>"]),
        ("generation", ["return 漢 🎉 first<|im_end|>", "  def f(x):\n<|im_end|>"]),
        ("no_system", [" return 漢 🎉 first</s>\n", "   def f(x):\n</s>"]),
    ],
)
def test_the_loss_falls_on_what_the_assistant_writes(tmp_path, name, parts):
    (document,) = corpus_of(tmp_path, model_of(tmp_path, TEMPLATES[name]), CHAT)
    assert learnt(document) == parts


def test_marks_in_comments_and_texts_are_none(tmp_path):
    for hidden in ("{# {% generation %} #}", "{{ '{% generation %}'[:0] }}"):
        corpus = corpus_of(tmp_path, model_of(tmp_path, hidden + CHATML), CHAT)
        (document,) = corpus
        assert sum(span.weight for span in document.spans) == 2


def test_a_token_that_begins_before_the_turn_has_its_weight(tmp_path):
    model = model_of(tmp_path, "{% for m in messages %}{{ m.content }}{% endfor %}")
    (document,) = corpus_of(tmp_path, model, turns("x re", "turn"))
    tokenizer = load_tokenizer("tokenizers", model)
    encoded = encode_rendered(tokenizer, document.text, document.spans)
    names = [tokenizer.decode([i]) for i in encoded.tokens]
    assert names == ["", "x", " return", ""]
    assert encoded.weights.tolist() == [0, 0, 1, 1]


def test_eos_that_follows_has_the_weight_of_the_last_turn(tmp_path):
    model = model_of(tmp_path, CHATML)
    chats = [CHAT, CHAT[:3]]
    tokenizer = load_tokenizer("tokenizers", model)
    last = [
        encode_rendered(tokenizer, document.text, document.spans).weights[-1]
        for document in corpus_of(tmp_path, model, *chats)
    ]
    assert last == [1, 0]


def test_bytes_of_special_tokens_are_not_counted_as_text(tmp_path):
    model = model_of(tmp_path, LLAMA3)
    (document,) = corpus_of(tmp_path, model, turns("def", "return"))
    encoded = encode_rendered(load_tokenizer("tokenizers", model), document.text, document.spans)
    assert encoded.text_bytes == len("user\n\ndefassistant\n\nreturn")
    assert encoded.restored == (encoded.text_bytes, encoded.text_bytes, "")


NO_PREFIX = (
    "{% for m in messages %}{{ m.role + ('!' if loop.last else ':') + m.content }}{% endfor %}"
)
REFUSED = {
    "no_list": ("x", CHATML, "field is not a list of messages"),
    "null": (None, CHATML, "field is not a list of messages"),
    "no_objects": (["x"], CHATML, "field is not a list of messages"),
    "empty": ([], CHATML, "empty"),
    "no_role": ([{"content": "x"}], CHATML, "a message has no role"),
    "no_content": ([{"role": "user"}], CHATML, "the content of a message is not text"),
    "parts": (
        [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
        CHATML,
        "the content of a message is not text",
    ),
    "user_alone": (turns("x"), CHATML, "no turn of the assistant"),
    "no_turn_marked": (turns("x"), GENERATION, "no turn of the assistant"),
    "half_pair": (turns("x", "\ud800"), CHATML, "invalid UTF-8"),
    "special": (turns("x", "a<|im_end|>b"), CHATML, "content holds a special token"),
    "eos": (turns("x</s>", "y"), CHATML, "content holds a special token"),
    "role": (turns("x", "y", roles=("<s>", "assistant")), CHATML, "content holds a special token"),
    "noncharacter": (turns("x", "\ufdd0"), GENERATION, "content holds a special token"),
    "raised": (
        turns("x", "y", roles=("system", "assistant")),
        TEMPLATES["no_system"],
        "the chat template refuses it (Conversation roles must alternate user/assistant)",
    ),
    "fails": (turns("x", "y"), "{{ messages + 1 }}", "the chat template refuses it (can only"),
    "no_prefix": (CHAT, NO_PREFIX, "the chat template does not show where the assistant's turns"),
    "nothing": (turns("x", "y"), "{% if false %}{% endif %}", "empty"),
}


@pytest.mark.parametrize(("record", "template", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_conversation_that_cannot_be_used_is_skipped(tmp_path, record, template, reason):
    corpus = corpus_of(tmp_path, model_of(tmp_path, template), record)
    assert list(corpus) == []
    ((found, count),) = corpus.skipped.counts.items()
    assert (found[: len(reason)], count) == (reason, 1)


def test_conversations_of_other_forms_are_read(tmp_path):
    shared = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]
    nulls = [{**message, "tool_calls": None, "from": None} for message in turns("x", "y")]
    corpus = corpus_of(tmp_path, model_of(tmp_path, CHATML), shared, nulls, turns("x", "y"))
    first, *others = (document.text for document in corpus)
    assert others == [first, first]


def test_other_fields_of_messages_are_handed_to_the_template(tmp_path):
    template = "{% for m in messages %}{{ m.name }}:{{ m.content }};{% endfor %}"
    named = [{**message, "name": message["content"].upper()} for message in turns("x", "y")]
    (document,) = corpus_of(tmp_path, model_of(tmp_path, template), named)
    assert document.text == "X:x;Y:y;"
    named[0]["name"] = "<s>"
    corpus = corpus_of(tmp_path, tmp_path / "tokenizer.json", named)
    assert list(corpus) == []


def test_parquet_and_datasets_have_conversations(tmp_path):
    model = model_of(tmp_path, CHATML)
    rows = [turns("x", "y"), None, turns("x")]
    table = pyarrow.table({"chat": [{"messages": row} for row in rows]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    datasets.Dataset.from_dict({"messages": rows}).save_to_disk(tmp_path / "saved")
    common = {
        "store": "", "tokenizer": TokenizerConfig(kind="tokenizers", model=str(model)),
    }  # fmt: skip
    for config in (
        DataConfig(
            source="files", files=[str(tmp_path / "a.parquet")], messages_field="chat.messages",
            **common,
        ),
        DataConfig(
            source="huggingface", dataset=str(tmp_path / "saved"), messages_field="messages",
            **common,
        ),
    ):  # fmt: skip
        corpus = Corpus(config)
        (document,) = corpus
        assert learnt(document) == ["y<|im_end|>\n"]
        reasons = {"field is not a list of messages": 1, "no turn of the assistant": 1}
        assert corpus.skipped.counts == reasons


def test_a_row_of_invalid_utf8_does_not_end_a_parquet(tmp_path):
    model = model_of(tmp_path, CHATML)
    kind = pyarrow.struct([("role", pyarrow.binary()), ("content", pyarrow.binary())])
    rows = [
        [{"role": b"user", "content": content}, {"role": b"assistant", "content": b"y"}]
        for content in (b"\xff", b"x")
    ]
    text = pyarrow.list_(
        pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])
    )
    column = pyarrow.array(rows, pyarrow.list_(kind)).cast(text, safe=False)
    pyarrow.parquet.write_table(pyarrow.table({"messages": column}), tmp_path / "a.parquet")
    corpus = Corpus(
        DataConfig(
            source="files", files=[str(tmp_path / "a.parquet")], messages_field="messages",
            store="", tokenizer=TokenizerConfig(kind="tokenizers", model=str(model)),
        )
    )  # fmt: skip
    assert len(list(corpus)) == 1
    assert corpus.skipped.counts == {"invalid UTF-8": 1}


def test_the_template_is_where_transformers_finds_it(tmp_path):
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    model = model_of(tmp_path, several)
    assert load_tokenizer("tokenizers", model).chat_template == CHATML
    (tmp_path / "chat_template.jinja").write_text(LLAMA3)
    assert load_tokenizer("tokenizers", model).chat_template == LLAMA3
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == LLAMA3
    named = tmp_path / "mine.jinja"
    named.write_text(GENERATION)
    config = TokenizerConfig(kind="tokenizers", model=str(model), chat_template=str(named))
    tokenizer = configured_tokenizer(config)
    saved = tmp_path / "saved"
    saved.mkdir()
    tokenizer.save(saved)
    assert load_tokenizer("tokenizers", saved / "tokenizer.json").chat_template == GENERATION
    assert AutoTokenizer.from_pretrained(saved).chat_template == GENERATION


@pytest.mark.parametrize(
    ("template", "named", "says"),
    [
        ("", None, r"^data\.tokenizer\.chat_template: must name .* \S+json has none beside it$"),
        ("{% if %}", None, r"^data\.tokenizer\.model \S+: its chat template cannot be parsed \("),
        ("", "{{ x | y }}", r"^data\.tokenizer\.chat_template \S+: cannot be parsed \(No filter"),
        ("", b"\xff\xfe", r"^data\.tokenizer\.chat_template \S+: is empty"),
        ("", b"\x80", r"^data\.tokenizer\.chat_template \S+: cannot be read \("),
        ("", "", r"^data\.tokenizer\.chat_template \S+: is empty"),
    ],
)
def test_a_template_that_is_none_is_refused_at_once(tmp_path, template, named, says):
    settings = {}
    if named is not None:
        content = named if isinstance(named, bytes) else named.encode()
        (tmp_path / "mine.jinja").write_bytes(content)
        settings["chat_template"] = str(tmp_path / "mine.jinja")
    with pytest.raises(UserError, match=says) as caught:
        corpus_of(tmp_path, model_of(tmp_path, template), CHAT, **settings)
    assert "\n" not in str(caught.value)


def test_bytes_have_bos_and_eos_alone_as_tokens(tmp_path):
    (tmp_path / "mine.jinja").write_text(TEMPLATES["zephyr"])
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": turns("x", "é<|a|>")}))
    tokenizer = TokenizerConfig(kind="bytes", chat_template=str(tmp_path / "mine.jinja"))
    (document,) = Corpus(
        DataConfig(
            source="files", files=[str(path)], messages_field="messages", store="",
            tokenizer=tokenizer,
        )
    )  # fmt: skip
    encoded = encode_rendered(load_tokenizer("bytes"), document.text, document.spans)
    before = [*b"<|user|>\nx", 257, *b"\n<|assistant|>\n"]
    answer = [*"é<|a|>".encode(), 257]
    assert encoded.tokens.tolist() == [256, *before, *answer]
    assert encoded.weights.tolist() == [0] * (1 + len(before)) + [1] * len(answer)
    assert encoded.weights.dtype == np.float32


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
@pytest.mark.parametrize("name", ["zephyr", "llama3"])
def test_other_kinds_have_the_tokens_of_their_exports(tmp_path, kind, name):
    (tmp_path / "mine.jinja").write_text(TEMPLATES[name])
    model = tmp_path / "a.model" if kind == "sentencepiece" else ""
    if model:
        train_sentencepiece(iter(SOURCE.split("\n")), 320, model)
    theirs = InfiniTokenizer(str(model) or None, chat_template=TEMPLATES[name])
    config = TokenizerConfig(
        kind=kind, model=str(model), chat_template=str(tmp_path / "mine.jinja")
    )
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": CHAT}))
    (document,) = Corpus(
        DataConfig(
            source="files", files=[str(path)], messages_field="messages", store="",
            tokenizer=config,
        )
    )  # fmt: skip
    tokenizer = load_tokenizer(kind, model)
    encoded = encode_rendered(tokenizer, document.text, document.spans)
    ids = theirs.apply_chat_template(CHAT, return_dict=False)
    end = -1 if name == "zephyr" else None  # white space behind EOS
    bos, eos = [tokenizer.bos_id], [tokenizer.eos_id]
    expected = bos * (ids[:1] != bos) + ids[:end] + eos * (name == "llama3")
    assert encoded.tokens.tolist() == expected
