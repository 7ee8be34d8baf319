"""Texts of unequal lengths in one batch: each is read as if it were alone."""

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from infini_ds import cli
from infini_ds.config import MemoryConfig
from tests.conversion.test_to_hf import N, make_export

torch.set_num_threads(1)

LENGTHS = (3 * N + 5, N - 3, 2 * N, 5)
MODELS: dict[str, dict] = {
    "linear-window": {"use_sliding_window": True, "memory": MemoryConfig(short_conv=6)},
    "delta": {"memory_rule": "delta", "num_kv_heads": 2, "qk_norm": True},
    "gated": {
        "memory_rule": "gated_delta", "num_kv_heads": 2, "use_sliding_window": True,
        "memory": MemoryConfig(write_gate=True, write_gate_sees_keys=True, short_conv=4),
        "tie_embeddings": True,
    },
}  # fmt: skip
GREEDY = {"do_sample": False, "max_new_tokens": N + 3, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, hf_modules) -> dict:
    folder = tmp_path_factory.mktemp("padding")
    for name, settings in MODELS.items():
        make_export(folder / "source" / name, None, **settings)
        source = str(folder / "source" / name)
        assert cli.main(["convert", "to-hf", source, str(folder / name)]) == 0
    return {
        name: AutoModelForCausalLM.from_pretrained(folder / name, trust_remote_code=True)
        for name in MODELS
    }


@pytest.fixture(params=MODELS)
def model(request, loaded):
    return loaded[request.param].eval()


@pytest.fixture(scope="module")
def texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 250, (length,), generator=generator) for length in LENGTHS]


def holes(length: int, most: int) -> Tensor:
    """Places of a text's tokens with padding anywhere between them."""
    generator = torch.Generator().manual_seed(length)
    return torch.randperm(most + 7, generator=generator)[:length].sort().values


WAYS = {
    "left": lambda length, most: torch.arange(most - length, most),
    "right": lambda length, most: torch.arange(length),
    "anywhere": holes,
}


def padded(texts: list[Tensor], way: str, fill: int = 7) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Returns token ids, the mask, and the places of each text's tokens."""
    most = max(map(len, texts))
    places = [WAYS[way](len(text), most) for text in texts]
    tokens = torch.full((len(texts), 1 + max(int(place.max()) for place in places)), fill)
    mask = torch.zeros_like(tokens)
    for row, (text, place) in enumerate(zip(texts, places, strict=True)):
        tokens[row, place], mask[row, place] = text, 1
    return tokens, mask, places


def close(got: Tensor, expected: Tensor) -> None:
    """In fp32, in which products of other shapes round otherwise."""
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=5e-5)


def alone(model, texts: list[Tensor]) -> list[Tensor]:
    return [model(text[None]).logits[0] for text in texts]


@pytest.mark.parametrize("given", ["ids", "embeddings"])
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_logits(way, given, model, texts):
    tokens, mask, places = padded(texts, way)
    chosen = {"input_ids": tokens}
    if given == "embeddings":
        chosen = {"inputs_embeds": model.get_input_embeddings()(tokens)}
    out = model(**chosen, attention_mask=mask, output_hidden_states=True)
    assert torch.isfinite(out.logits).all()
    head = model.get_output_embeddings()
    last = out.hidden_states[-1]
    again = head(last) if head else last @ model.get_input_embeddings().weight.T
    torch.testing.assert_close(again, out.logits)
    for row, (place, expected) in enumerate(zip(places, alone(model, texts), strict=True)):
        close(out.logits[row, place], expected)


@torch.no_grad()
def test_padding_that_is_not_read_may_be_any_token(model, texts):
    first = model(*padded(texts, "anywhere", fill=7)[:2]).logits
    assert torch.equal(first, model(*padded(texts, "anywhere", fill=99)[:2]).logits)


@torch.no_grad()
def test_padding_has_the_logits_of_the_token_before_it(model, texts):
    tokens, mask, _ = padded(texts, "right")
    logits = model(tokens, attention_mask=mask, logits_to_keep=1).logits[:, 0]
    for row, expected in enumerate(alone(model, texts)):
        close(logits[row], expected[-1])


@pytest.mark.parametrize("whole_mask", [True, False])
@torch.no_grad()
def test_a_cache_goes_on_with_texts_that_stopped_anywhere(whole_mask, model, texts):
    expected = alone(model, texts)
    parts: list[list[Tensor]] = [[] for _ in texts]
    cache, seen = None, torch.zeros(len(texts), 0, dtype=torch.long)
    for turn in range(4):  # each text is cut at places of its own
        cuts = (
            [len(text) * turn // 4 for text in texts],
            [len(text) * (turn + 1) // 4 for text in texts],
        )
        pieces = [text[a:b] for text, a, b in zip(texts, *cuts, strict=True)]
        tokens, mask, places = padded(pieces, ["left", "right"][turn % 2])
        seen = torch.cat((seen, mask), dim=1)
        out = model(
            tokens, attention_mask=seen if whole_mask else mask, past_key_values=cache,
            position_ids=torch.tensor(cuts[0])[:, None] + (mask.cumsum(dim=1) - 1).clamp(min=0),
        )  # fmt: skip
        cache = out.past_key_values
        assert cache.get_seq_length() == seen.shape[1]
        for row, place in enumerate(places):
            parts[row].append(out.logits[row, place])
    assert cache.read == [*LENGTHS]
    for own, whole in zip(parts, expected, strict=True):
        close(torch.cat(own), whole)
    # Without a mask, all texts go on alike from unequal places.
    more = torch.arange(len(texts) * 2 * N).view(len(texts), -1) % 250
    out = model(more, past_key_values=cache)
    for row, text in enumerate(texts):
        whole = model(torch.cat((text, more[row]))[None]).logits[0, len(text) :]
        close(out.logits[row], whole)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("way", ["left", "right"])
def test_generate(way, settings, model, texts):
    tokens, mask, _ = padded(texts, way)
    made = model.generate(tokens, attention_mask=mask, **GREEDY, **settings)
    for row, text in enumerate(texts):
        expected = model.generate(text[None], **GREEDY, **settings)[0, len(text) :]
        assert made[row, tokens.shape[1] :].tolist() == expected.tolist()


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_the_texts_alone(way, model, texts):
    tokens, mask, _ = padded(texts, way)
    count = sum(LENGTHS) - len(LENGTHS)
    gradients = []
    for batches in ([(tokens, mask)], [(text[None], None) for text in texts]):
        model.zero_grad()
        for ids, given in batches:
            labels = ids if given is None else ids.masked_fill(given == 0, -100)
            out = model(ids, attention_mask=given, labels=labels, num_items_in_batch=count)
            out.loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for padded_gradient, expected in zip(*gradients, strict=True):
        close(padded_gradient, expected)


@torch.no_grad()
def test_a_row_without_text_leaves_the_others_as_they_are(model, texts):
    tokens, mask, places = padded(texts, "left")
    expected = model(tokens, attention_mask=mask)
    mask[1] = 0
    out = model(tokens, attention_mask=mask)
    assert out.past_key_values.read == [LENGTHS[0], 0, *LENGTHS[2:]]
    for row in (0, 2, 3):
        close(out.logits[row, places[row]], expected.logits[row, places[row]])
    assert torch.isfinite(out.logits).all()


REFUSED = {
    "four-dimensions": (lambda t: torch.ones(4, 1, 5, 5), r"attention_mask \[4, 1, 5, 5\] must be"),
    "another-length": (lambda t: torch.ones(4, 3), r"\[4, 3\] must be \[4, 60\]"),
    "other-rows": (lambda t: torch.ones(3, 60), r"\[3, 60\] must be \[4, 60\]"),
    "nothing-but-padding": (lambda t: torch.zeros(4, 60), "at least one token that is not padding"),
    "weights": (lambda t: torch.full((4, 60), 0.5), "must have 1 for text and 0 for padding"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_in_one_line(what, model):
    tokens = torch.zeros(4, 60, dtype=torch.long)
    mask, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        model(tokens, attention_mask=mask(tokens))


def test_positions_count_no_padding(model, texts):
    tokens, mask, _ = padded(texts, "left")
    with pytest.raises(ValueError, match="position_ids must go on from 0"):
        model(tokens, attention_mask=mask, position_ids=torch.arange(tokens.shape[1])[None])
