"""What transformers calls on an export and reads of it: what holds, and what is refused in a line.

The list is that of transformers' own common tests of models, of generation and of tokenizers.
"""

import copy
import io
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from infini_ds import cli
from infini_ds.config import MemoryConfig
from infini_ds.data.sentencepiece_tokenizer import train_sentencepiece
from tests.conversion.test_to_hf import N, make_export

torch.set_num_threads(1)

LENGTH = 3 * N + 5
MODELS: dict[str, dict] = {
    "tied": {
        "memory_rule": "delta", "num_kv_heads": 2, "tie_embeddings": True,
        "memory": MemoryConfig(write_gate=True, short_conv=6), "qk_norm": True,
    },
    "untied": {"head_bias": True},
    "gated": {
        "memory_rule": "gated_delta", "num_kv_heads": 2,
        "memory": MemoryConfig(write_gate=True, short_conv=True),
    },
}  # fmt: skip
LINES = "The  <s> memory </s>\n\té 漢 ▁ <0x41>"


@pytest.fixture(scope="module")
def exports(tmp_path_factory, hf_modules) -> Path:
    """A folder with an export of each of MODELS, `tied` with a sentencepiece model."""
    folder = tmp_path_factory.mktemp("contract")
    train_sentencepiece(iter([LINES, "a segment of all memory"] * 20), 320, folder / "sp.model")
    for name, settings in MODELS.items():
        source = folder / "source" / name
        make_export(source, folder / "sp.model" if name == "tied" else None, **settings)
        assert cli.main(["convert", "to-hf", str(source), str(folder / name)]) == 0
    return folder


def load(folder: str | Path, **settings):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **settings)


@pytest.fixture(scope="module")
def loaded(exports) -> dict:
    return {name: load(exports / name) for name in MODELS}


@pytest.fixture(params=MODELS)
def model(request, loaded):
    """For a test to change."""
    return copy.deepcopy(loaded[request.param])


@pytest.fixture
def tied(loaded):
    return copy.deepcopy(loaded["tied"])


@pytest.fixture(params=["tied", "gated"])
def writer(request, loaded):
    """Of a rule with z and of one without, both with all that a model may learn of writing."""
    return copy.deepcopy(loaded[request.param])


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(250, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def checkpointed(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the name will be another in 6
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return model.train()


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved_as_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def with_all_hidden(model, tokens):
    out = model(tokens, output_hidden_states=True)
    assert [len(out.hidden_states), *out.hidden_states[1].shape] == [3, *tokens.shape, 32]
    head = model.get_output_embeddings()
    last = out.hidden_states[-1]
    again = head(last) if head else last @ model.get_input_embeddings().weight.T
    torch.testing.assert_close(again, out.logits)
    return out.logits


def in_pieces(model, tokens):
    cache: Any = None
    parts = []
    for piece in tokens.split(N // 2 + 1, dim=1):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    assert cache.get_seq_length() == LENGTH
    return torch.cat(parts, dim=1)


SAME_LOGITS = {
    "inputs_embeds": lambda m, t: m(inputs_embeds=m.get_input_embeddings()(t)).logits,
    "attention_mask-of-ones": lambda m, t: m(t, attention_mask=torch.ones_like(t)).logits,
    "attention_mask-of-true": lambda m, t: m(t, attention_mask=t > -1).logits,
    "position_ids-that-go-on": lambda m, t: m(t, position_ids=torch.arange(LENGTH)[None]).logits,
    "cache_position-that-goes-on": lambda m, t: m(t, cache_position=torch.arange(LENGTH)).logits,
    "return_dict-false": lambda m, t: m(t, return_dict=False)[0],
    "use_cache-false": lambda m, t: m(t, use_cache=False).logits,
    "a-cache-in-pieces": in_pieces,
    "logits_to_keep-more-than-all": lambda m, t: m(t, logits_to_keep=LENGTH + 9).logits,
    "logits_to_keep-indices": lambda m, t: m(t, logits_to_keep=torch.arange(-LENGTH, 0)).logits,
    "output_hidden_states": with_all_hidden,
    "train": lambda m, t: m.train()(t).logits,
    "gradient_checkpointing": lambda m, t: checkpointed(m, use_reentrant=False)(t).logits,
    "deepcopy": lambda m, t: copy.deepcopy(m)(t).logits,
    "pickle": lambda m, t: pickled(m)(t).logits,
    "torch.save": lambda m, t: saved_as_torch(m)(t).logits,
    "tie_weights": lambda m, t: (m.tie_weights(), m(t))[1].logits,
    "set_attn_implementation-eager": lambda m, t: (m.set_attn_implementation("eager"), m(t))[1][0],
    "another-dtype-and-back": lambda m, t: m.float().double()(t).logits,
}  # fmt: skip


@pytest.mark.parametrize("way", SAME_LOGITS)
def test_logits_are_the_same_by(way, model, tokens):
    """In fp64: in fp32, pieces of other lengths alone move a logit by 1e-5 on some processors."""
    expected = model.double()(tokens).logits.detach()
    torch.testing.assert_close(SAME_LOGITS[way](model, tokens), expected, rtol=0, atol=5e-6)


def after(model, tokens: Tensor, read: int):
    return model(tokens[:, :read], use_cache=True).past_key_values


ALL = torch.ones(2, LENGTH, dtype=torch.int64)
SAME_TEXT = {
    "use_cache-false": lambda m, t: {"inputs": t, "use_cache": False},
    "inputs_embeds": lambda m, t: {"inputs_embeds": m.get_input_embeddings()(t)},
    "attention_mask": lambda m, t: {"inputs": t, "attention_mask": ALL},
    "position_ids": lambda m, t: {"inputs": t, "position_ids": torch.arange(LENGTH)[None]},
    "a-cache-and-the-whole-text": lambda m, t: {"inputs": t, "past_key_values": after(m, t, N + 3)},
    "a-cache-of-whole-segments": lambda m, t: {"inputs": t, "past_key_values": after(m, t, 2 * N)},
    "a-cache-and-what-follows": lambda m, t: {
        "inputs": t[:, 5:], "past_key_values": after(m, t, 5), "attention_mask": ALL,
    },
    "a-cache-that-is-empty": lambda m, t: {"inputs": t, "past_key_values": type(after(m, t, 1))()},
    "prefill_chunk_size": lambda m, t: {
        "inputs": t, "past_key_values": after(m, t, 5), "prefill_chunk_size": 7,
    },
    "cache_implementation-static": lambda m, t: {"inputs": t, "cache_implementation": "static"},
    "cache_implementation-quantized": lambda m, t: {
        "inputs": t, "cache_implementation": "quantized",
    },
    "max_length": lambda m, t: {"inputs": t, "max_new_tokens": None, "max_length": LENGTH + 20},
    "num_return_sequences": lambda m, t: {
        "inputs": t, "do_sample": True, "top_k": 1, "num_return_sequences": 2,
    },
}  # fmt: skip
GREEDY = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 329, "eos_token_id": None}


@pytest.mark.parametrize("way", SAME_TEXT)
@torch.no_grad()
def test_generate_writes_the_same_by(way, writer, tokens):
    expected = writer.generate(tokens, **GREEDY)[:, LENGTH:]
    written = writer.generate(**{**GREEDY, **SAME_TEXT[way](writer, tokens)})[:, -20:]
    assert torch.equal(written[:: len(written) // 2], expected)


def test_beams_have_the_likelihood_of_their_text(writer, tokens):
    out = writer.generate(
        tokens, **GREEDY, num_beams=3, num_return_sequences=2, length_penalty=0.0,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    with torch.no_grad():
        logits = writer(out.sequences).logits[:, LENGTH - 1 : -1].log_softmax(-1)
    each = logits.gather(-1, out.sequences[:, LENGTH:, None])[..., 0]
    torch.testing.assert_close(each.sum(-1), out.sequences_scores, rtol=1e-4, atol=1e-4)
    assert out.sequences.shape == (4, LENGTH + 20)


@torch.no_grad()
def test_a_cache_is_repeated_for_beams_and_kept_by_deepcopy(writer, tokens):
    writer = writer.double()
    cache = after(writer, tokens, N + 3)
    kept = copy.deepcopy(cache)
    cache.batch_repeat_interleave(3)
    with_cache = writer.generate(tokens, **GREEDY, num_beams=3, past_key_values=cache)
    assert torch.equal(with_cache, writer.generate(tokens, **GREEDY, num_beams=3))
    assert (kept.tokens, cache.tokens) == (N + 3, LENGTH + 19)
    rest = writer(tokens[:, N + 3 :], past_key_values=kept).logits
    torch.testing.assert_close(rest, writer(tokens).logits[:, N + 3 :], rtol=0, atol=5e-6)


def test_a_text_ends_at_each_end_and_at_a_stop_string(tied, tokens, exports):
    one = tokens[:1]
    written = tied.generate(one, **GREEDY)[0, LENGTH:].tolist()
    new = [at for at, token in enumerate(written) if at >= 4 and token not in written[:at]]
    for at in new[0], new[-1]:
        ends = {"eos_token_id": [written[at], 329], "min_new_tokens": 4}
        made = tied.generate(one, **{**GREEDY, **ends})[0, LENGTH:].tolist()
        assert made == written[: at + 1]
    tokenizer = AutoTokenizer.from_pretrained(exports / "tied", trust_remote_code=True)
    text = tokenizer.decode(written)
    stop = text[len(text) // 2 :][:2]
    made = tied.generate(one, **GREEDY, stop_strings=[stop], tokenizer=tokenizer)[0, LENGTH:]
    assert len(made) < 20
    assert stop in tokenizer.decode(made)


def test_a_streamer_gets_the_prompt_and_every_token(tied, tokens):
    class Streamer:
        got: list[int] = []  # noqa: RUF012

        def put(self, value):
            self.got += value.flatten().tolist()

        def end(self):
            self.got.append(-1)

    made = tied.generate(tokens[:1], **GREEDY, streamer=(streamer := Streamer()))
    assert streamer.got == [*made[0].tolist(), -1]


REFUSED = {
    "packed-texts": (
        lambda m, t: m(t, position_ids=torch.arange(LENGTH)[None] % 9),
        "position_ids must go on from 0",
    ),
    "positions-that-begin-again": (
        lambda m, t: m(t[:, 5:], past_key_values=after(m, t, 5), position_ids=t[:1, 5:]),
        "position_ids must go on from 5",
    ),
    "cu_seq_lens": (lambda m, t: m(t, cu_seq_lens_q=t), "cu_seq_lens_q is not supported"),
    "token_type_ids": (lambda m, t: m(t, token_type_ids=t), "token_type_ids is not supported"),
    "output_attentions": (
        lambda m, t: m(t, output_attentions=True), "output_attentions must be false",
    ),
    "output_attentions-in-generate": (
        lambda m, t: m.generate(t, output_attentions=True, return_dict_in_generate=True),
        "output_attentions must be false",
    ),
    "a-dynamic-cache": (
        lambda m, t: m(t, past_key_values=DynamicCache()), r"past_key_values \(DynamicCache\) must",
    ),
    "a-dynamic-cache-in-generate": (
        lambda m, t: m.generate(t, past_key_values=DynamicCache()), "must be an InfiniCache",
    ),
    "a-tuple-as-cache": (lambda m, t: m(t, past_key_values=((t, t),)), "must be an InfiniCache"),
    "a-cache-of-fewer-rows": (
        lambda m, t: m(t, past_key_values=after(m, t[:1], 5)), "holds 1 texts, the batch 2",
    ),
    "a-cache-for-beams": (
        lambda m, t: m.generate(t, num_beams=3, past_key_values=after(m, t, 5)),
        "holds 2 texts, the batch 6",
    ),
    "a-cache-of-the-whole-text": (
        lambda m, t: m.generate(t, past_key_values=after(m, t, LENGTH)),
        "give the whole text, at least one token longer",
    ),
    "a-cache-without-use_cache": (
        lambda m, t: m.generate(t, past_key_values=after(m, t, 5), use_cache=False),
        "use_cache must be true",
    ),
    "a-cache-cropped": (lambda m, t: after(m, t, 5).crop(3), "cannot be cropped"),
    "no-tokens": (lambda m, t: m(t[:, :0]), "at least one token"),
    "neither-ids-nor-embeddings": (lambda m, t: m(), "either input_ids or inputs_embeds"),
    "ids-and-embeddings": (lambda m, t: m(t, inputs_embeds=t), "either input_ids or"),
    "labels-of-few-logits": (lambda m, t: m(t, labels=t, logits_to_keep=3), "logits_to_keep must"),
    "an-assistant": (
        lambda m, t: m.generate(t[:1], assistant_model=m), "assisted generation is not supported",
    ),
    "prompt-lookup": (
        lambda m, t: m.generate(t[:1], prompt_lookup_num_tokens=3), "assisted generation is not",
    ),
    "paged": (
        lambda m, t: m.generate(t, cache_implementation="paged"), "no continuous batching",
    ),
    "flash_attention_2": (
        lambda m, t: load(m.name_or_path, attn_implementation="flash_attention_2"),
        "[Ff]lash",
    ),
    "an-output-embedding-for-a-tied-model": (
        lambda m, t: m.set_output_embeddings(torch.nn.Linear(32, 9)), "tie_word_embeddings is true",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
@torch.no_grad()
def test_refused_in_one_line(what, tied, tokens):
    call, message = REFUSED[what]
    before = tied(tokens).logits
    with pytest.raises((ValueError, TypeError, NotImplementedError, ImportError), match=message):
        call(tied, tokens)
    assert torch.equal(tied(tokens).logits, before)


LOSSES = {
    "mean": ({}, lambda each: each[:, :-1].mean()),
    "some-ignored": ({"ignored": 9}, lambda each: each[:, 8:-1].mean()),
    "num_items_in_batch": ({"num_items_in_batch": 1000}, lambda each: each[:, :-1].sum() / 1000),
    "num_items_in_batch-tensor": (
        {"num_items_in_batch": torch.tensor(77)}, lambda each: each[:, :-1].sum() / 77,
    ),
    "shift_labels": ({"shifted": True}, lambda each: each[:, :-1].mean()),
    "bfloat16": ({"dtype": torch.bfloat16}, lambda each: each[:, :-1].mean()),
}  # fmt: skip


@pytest.mark.parametrize("case", LOSSES)
@torch.no_grad()
def test_loss(case, model, tokens):
    options, expected = LOSSES[case]
    options = dict(options)
    model = model.to(options.pop("dtype", torch.float32))
    labels = tokens.clone()
    labels[:, : options.pop("ignored", 0)] = -100
    if options.pop("shifted", False):
        options["shift_labels"] = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        labels = torch.zeros_like(labels)
    out = model(tokens, labels=labels, **options)
    following = tokens.roll(-1, dims=1)[..., None]
    each = -out.logits.float().log_softmax(-1).gather(-1, following)[..., 0]
    torch.testing.assert_close(out.loss, expected(each))
    assert out.loss.dtype == torch.float32


def gradients(model, *batches: Tensor, **options) -> list[Tensor]:
    for batch in batches:
        model(batch, labels=batch, **options).loss.backward()
    return [parameter.grad for parameter in model.parameters()]


def test_accumulated_gradients_are_those_of_the_batch_at_once(model, tokens):
    assert (model.accepts_loss_kwargs, model.loss_type) == (True, "ForCausalLM")  # it is asked
    whole = gradients(copy.deepcopy(model), tokens)
    count = torch.tensor(2 * (LENGTH - 1))
    parts = gradients(model, *tokens.split(1), num_items_in_batch=count)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_the_same_with_checkpoints(reentrant, model, tokens):
    expected = gradients(copy.deepcopy(model).train(), tokens)
    found = gradients(checkpointed(model, use_reentrant=reentrant), tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_trainer_shifts_labels_that_it_smooths_and_drops_caches(loaded):
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert type(loaded["tied"]).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    assert loaded["tied"].config.keys_to_ignore_at_inference == ["past_key_values"]


RESIZED = {
    "bigger": (337, {}, 337),
    "bigger-by-noise": (337, {"mean_resizing": False}, 337),
    "smaller": (300, {}, 300),
    "padded": (331, {"pad_to_multiple_of": 64}, 384),
    "padded-as-it-is": (None, {"pad_to_multiple_of": 64}, 384),
    "as-it-is": (330, {}, 330),
}


@pytest.mark.parametrize("case", RESIZED)
@torch.no_grad()
def test_embeddings_are_resized_and_loaded_again(case, model, tokens, tmp_path):
    size, options, expected = RESIZED[case]
    before = model(tokens).logits
    model.resize_token_embeddings(size, **options)
    after = model(tokens).logits
    kept = min(330, expected)
    torch.testing.assert_close(after[..., :kept], before[..., :kept], rtol=1e-5, atol=1e-5)
    assert [after.shape[-1], model.config.vocab_size] == [expected, expected]
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(again(tokens).logits, after)
    head = again.get_output_embeddings()
    assert (head is None) == again.config.tie_word_embeddings


@torch.no_grad()
def test_it_is_saved_in_shards_and_in_its_dtype(model, tokens, tmp_path):
    model.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = load(tmp_path, dtype="auto")
    assert again.dtype == torch.bfloat16
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert load(tmp_path, dtype=torch.float32, attn_implementation="sdpa").dtype == torch.float32


def test_weights_that_are_missing_begin_as_in_training(loaded):
    config = copy.deepcopy(loaded["tied"].config)
    made = type(loaded["tied"]).from_pretrained(None, config=config, state_dict={})
    for name, weight in made.named_parameters():
        if name.endswith("beta"):
            assert not weight.any(), name
        elif name.endswith("short_conv.weight"):
            assert not weight[:, :-1].any()
            assert (weight[:, -1] == 1).all()
        elif name.endswith("proj.weight"):
            assert 0.5 < weight.std() / config.initializer_range < 2, name


READ = {
    "num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 330, "num_attention_heads": 4,
    "use_cache": True, "is_encoder_decoder": False, "initializer_range": 0.3, "pad_token_id": None,
    "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_config_has(name, tied):
    assert getattr(tied.config.get_text_config(), name) == READ[name]
    again = type(tied.config).from_dict(tied.config.to_dict())
    assert getattr(again, name) == READ[name]


def test_pieces_for_several_devices_and_ranks_are_named(tied):
    names = {type(module).__name__ for module in tied.modules()}
    assert set(tied._no_split_modules) <= names
    assert not tied.supports_context_parallel
    assert tied.can_generate()
    assert tied.main_input_name == "input_ids"
    assert {"layers.1.self_attn.qkv_proj", "layers.2.mlp.down_proj"} <= {
        name for name, _ in tied.named_modules()
    }


@pytest.mark.slow
@torch.no_grad()
def test_it_compiles(tied, tokens):
    compiled = torch.compile(tied, backend="eager")
    torch.testing.assert_close(compiled(tokens).logits, tied(tokens).logits)


def test_a_pipeline_writes_text(exports, capfd):
    made = transformers.pipeline(
        "text-generation", str(exports / "untied"), trust_remote_code=True, device="cpu"
    )("The memory", max_new_tokens=5, do_sample=False)
    assert made[0]["generated_text"].startswith("The memory")
    assert "is not supported" not in capfd.readouterr().err


@pytest.fixture(params=MODELS)
def tokenizer(request, exports):
    return AutoTokenizer.from_pretrained(exports / request.param, trust_remote_code=True)


def add(tokenizer) -> int:
    """Two special tokens and a word; the first id."""
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<|a|>"]})
    tokenizer.add_tokens(["newword"])
    assert len(tokenizer) == size + 3
    return size


def text_comes_back(tokenizer):
    ids = tokenizer(LINES).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == LINES
    assert tokenizer.decode(ids[1:]) == LINES
    assert ids == [tokenizer.bos_token_id, *tokenizer.encode(LINES, add_special_tokens=False)]
    found = tokenizer.convert_ids_to_tokens(ids)
    assert tokenizer.convert_tokens_to_ids(found) == ids
    assert tokenizer.convert_tokens_to_string(tokenizer.tokenize(LINES)) == LINES


def sizes_agree(tokenizer):
    assert len(tokenizer) == tokenizer.vocab_size == len(tokenizer.get_vocab())


def special_tokens_are_told(tokenizer):
    encoded = tokenizer("ab", return_special_tokens_mask=True)
    assert encoded.special_tokens_mask == [1, *[0] * (len(encoded.input_ids) - 1)]
    again = tokenizer.get_special_tokens_mask(encoded.input_ids, already_has_special_tokens=True)
    assert again == encoded.special_tokens_mask
    assert tokenizer.num_special_tokens_to_add() == 1


def unknown_tokens_have_no_id_of_another(tokenizer):
    assert tokenizer.convert_tokens_to_ids("no such token") == tokenizer.unk_token_id


def added_tokens_are_found_and_skipped(tokenizer):
    first = add(tokenizer)
    ids = tokenizer("x<|a|>newword<s>").input_ids
    assert [i for i in ids if i >= first] == [first + 1, first + 2]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "xnewword<s>"
    assert ids.count(tokenizer.bos_token_id) == 1, "what is written like BOS is text"
    assert tokenizer("x<s>", split_special_tokens=False).input_ids[-1] == tokenizer.bos_token_id


def words_and_their_spaces(tokenizer):
    from transformers import AddedToken

    tokenizer.add_tokens([AddedToken("word", single_word=True, lstrip=True, rstrip=True)])
    i = tokenizer.convert_tokens_to_ids("word")
    assert tokenizer("words").input_ids.count(i) == 0
    before, after = (tokenizer.encode(x, add_special_tokens=False) for x in ("a", "b"))
    assert tokenizer.encode("a  word b", add_special_tokens=False) == [*before, i, *after]


def batches_are_padded_and_cut(tokenizer):
    add(tokenizer)
    texts, pad = ["a", "abc"], tokenizer.pad_token_id
    right = tokenizer(texts, padding=True)
    left = tokenizer(texts, padding=True, padding_side="left")
    lengths = [len(tokenizer(text).input_ids) for text in texts]
    assert right.input_ids[0][lengths[0] :] == [pad] * (lengths[1] - lengths[0])
    assert left.input_ids[0][0] == pad
    assert sum(left.attention_mask[0]) == lengths[0]
    assert tokenizer("abcdef", truncation=True, max_length=3).input_ids == tokenizer("ab").input_ids
    assert tokenizer.batch_decode(right.input_ids, skip_special_tokens=True) == texts


def it_is_saved_with_what_was_added(tokenizer, tmp_path):
    add(tokenizer)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<|a|>{{ m.content }}{% endfor %}"
    )
    ids = tokenizer("x<|a|>newword<s>").input_ids
    for place in ("once", "twice"):
        tokenizer.save_pretrained(tmp_path / place)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / place, trust_remote_code=True)
        assert tokenizer("x<|a|>newword<s>").input_ids == ids
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], return_dict=False)
    assert chat == [tokenizer.bos_token_id, ids[2], ids[1]]


def copies_are_the_same(tokenizer):
    for made in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert made(LINES).input_ids == tokenizer(LINES).input_ids


def spaces_are_kept(tokenizer):
    text = " a , b . 'll "
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]


TOKENIZERS = (
    text_comes_back, sizes_agree, special_tokens_are_told, unknown_tokens_have_no_id_of_another,
    added_tokens_are_found_and_skipped, words_and_their_spaces, batches_are_padded_and_cut,
    it_is_saved_with_what_was_added, copies_are_the_same, spaces_are_kept,
)  # fmt: skip


@pytest.mark.parametrize("holds", TOKENIZERS, ids=lambda holds: re.sub("_", "-", holds.__name__))
def test_of_a_tokenizer(holds, tokenizer, tmp_path):
    holds(*(tokenizer, tmp_path)[: holds.__code__.co_argcount])
