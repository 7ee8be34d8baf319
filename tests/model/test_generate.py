"""Generation: the same text as repeated full forward passes, in bounded memory."""

import pytest
import torch

from infini_ds.model.generation import Sampling, sample, stream
from infini_ds.model.reading import WINDOW_SEGMENTS

N = 8


def greedy_by_full_forward(model, prompt, count):
    tokens = prompt
    for _ in range(count):
        with torch.no_grad():
            logits = model(tokens).logits[:, -1]
        tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), dim=1)
    return tokens[:, prompt.shape[1] :]


@pytest.mark.parametrize("length", [1, 5, 8, 9, 20])
def test_greedy_equals_argmax_of_full_forward(make_model, make_tokens, rule, options, length):
    model, prompt = make_model(memory_rule=rule, **options), make_tokens(2, length)
    expected = greedy_by_full_forward(model, prompt, 2 * N + 3)
    assert torch.equal(model.generate(prompt, 2 * N + 3, temperature=0), expected)


def test_ragged_prompts_equal_single_ones(make_model, make_tokens, rule, options):
    model = make_model(memory_rule=rule, **options)
    prompts = [make_tokens(1, length, seed=length)[0] for length in (3, 8, 21)]
    together = model.generate(prompts, 20, temperature=0)
    for prompt, row in zip(prompts, together, strict=True):
        assert torch.equal(model.generate(prompt[None], 20, temperature=0)[0], row)


def test_memory_continuation_equals_whole_prompt(make_model, make_tokens, rule, options):
    model, prompt = make_model(memory_rule=rule, **options), make_tokens(2, 27)
    memory = model(prompt[:, :19]).memory.detach()
    expected = model.generate(prompt, 12, temperature=0)
    assert torch.equal(model.generate(prompt[:, 19:], 12, temperature=0, memory=memory), expected)


def test_cache_never_holds_more_than_one_segment(make_model, make_tokens, monkeypatch):
    model = make_model()
    seen = []
    read = model.read

    def spy(tokens, memory=None):
        hidden, memory = read(tokens, memory)
        seen.append((tokens.shape[1], memory.keys.shape[2], max(memory.lengths)))
        return hidden, memory

    monkeypatch.setattr(model, "read", spy)
    model.generate(make_tokens(1, 37 * N + 3), 2 * N, temperature=0)
    longest_piece, cache, open_tokens = (max(column) for column in zip(*seen, strict=True))
    assert longest_piece == WINDOW_SEGMENTS * N
    assert cache == N
    assert open_tokens < N


def test_stop_token_ends_a_row_and_then_the_whole(make_model, make_tokens):
    model, prompt = make_model(), make_tokens(2, 6)
    free = model.generate(prompt, 15, temperature=0)
    stop = int(free[0, 4])
    stopped = model.generate(prompt, 15, temperature=0, stop_token=stop)
    for row, free_row in zip(stopped, free, strict=True):
        first = (free_row == stop).nonzero()
        end = int(first[0]) if len(first) else len(row)
        assert torch.equal(row[:end], free_row[:end])
        assert (row[end:] == stop).all()
    alone = model.generate(prompt[:1], 15, temperature=0, stop_token=stop)
    first = int((free[0] == stop).nonzero()[0])
    assert alone.shape == (1, first + 1)


@pytest.mark.parametrize("more", [[], [999], [3, 999]], ids=["one", "two", "three"])
def test_a_row_ends_at_any_of_several_stop_tokens(more, make_model, make_tokens):
    model, prompt = make_model(), make_tokens(2, 6)
    free = model.generate(prompt, 15, temperature=0)
    first, later = int(free[0, 2]), int(free[1, 6])
    stopped = model.generate(prompt, 15, temperature=0, stop_token=[first, later, *more])
    for row, free_row in zip(stopped, free, strict=True):
        at = next(i for i, token in enumerate(free_row.tolist()) if token in (first, later, *more))
        assert torch.equal(row[: at + 1], free_row[: at + 1])
        assert (row[at + 1 :] == first).all()


def test_stream_gives_each_column_before_the_next_is_computed(make_model, make_tokens, monkeypatch):
    model, prompt = make_model(), make_tokens(2, 6)
    expected = model.generate(prompt, 5, temperature=0)
    reads = []
    read = model.read
    monkeypatch.setattr(model, "read", lambda *given: reads.append(given) or read(*given))
    for number, column in enumerate(stream(model, prompt, 5, Sampling(temperature=0)), start=1):
        assert torch.equal(column, expected[:, number - 1])
        assert len(reads) == number
    assert number == 5


def test_stream_that_is_given_up_restores_training_mode(make_model, make_tokens):
    model = make_model().train()
    columns = stream(model, make_tokens(1, 3), 5)
    next(columns)
    columns.close()
    assert model.training


def test_same_generator_same_text(make_model, make_tokens):
    model, prompt = make_model(), make_tokens(2, 6)
    first, second = (
        model.generate(prompt, 20, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(first, second)


def test_generate_restores_training_mode(make_model, make_tokens):
    model = make_model().train()
    model.generate(make_tokens(1, 3), 1)
    assert model.training


def drawn(probabilities, **settings):
    """The share of each token in many draws."""
    logits = torch.tensor(probabilities).log().expand(20_000, -1)
    tokens = sample(logits, Sampling(**settings), torch.Generator().manual_seed(0))
    return tokens.bincount(minlength=len(probabilities)) / len(tokens)


def test_sampling_follows_the_distribution():
    expected = torch.tensor([0.1, 0.5, 0.1, 0.3])
    torch.testing.assert_close(drawn(expected.tolist()), expected, atol=0.02, rtol=0)


def test_top_k_keeps_the_likeliest_tokens():
    expected = torch.tensor([0, 5 / 8, 0, 3 / 8])
    share = drawn([0.1, 0.5, 0.12, 0.3], top_k=2)
    torch.testing.assert_close(share, expected, atol=0.02, rtol=0)


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    probabilities = [0.1, 0.5, 0.1, 0.3]
    assert (drawn(probabilities, top_p=0.45) > 0).tolist() == [False, True, False, False]
    assert (drawn(probabilities, top_p=0.55) > 0).tolist() == [False, True, False, True]
    assert (drawn(probabilities, top_p=1e-6) > 0).tolist() == [False, True, False, False]


def test_temperature_sharpens_the_distribution():
    squares = torch.tensor([0.1, 0.5, 0.1, 0.3]) ** 2
    share = drawn([0.1, 0.5, 0.1, 0.3], temperature=0.5)
    torch.testing.assert_close(share, squares / squares.sum(), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"max_new_tokens": 0}],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_out_of_range_are_refused(make_model, make_tokens, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        make_model().generate(make_tokens(1, 3), **({"max_new_tokens": 1} | settings))


def test_empty_prompt_is_refused(make_model):
    with pytest.raises(ValueError, match="at least one token"):
        make_model().generate(torch.zeros(1, 0, dtype=torch.long), 3)
