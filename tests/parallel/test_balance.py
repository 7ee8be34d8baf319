import itertools

import pytest

from infini_ds.model.flops import forward_flops_per_token
from infini_ds.parallel.pipeline.balance import balance, describe
from tests import tiny


def model(num_layers, vocab_size):
    return tiny.model_config(
        vocab_size=vocab_size, hidden_size=64, num_layers=num_layers, head_dim=32, segment_length=64
    )


def loads(config, bounds):
    _, *blocks, _, head = forward_flops_per_token(config)
    sums = [sum(blocks[first:end]) for first, end in itertools.pairwise(bounds)]
    return [*sums[:-1], sums[-1] + head]


SPLITS = [
    pytest.param(layers, stages, vocab, id=f"{layers}_layers-{stages}_stages-vocab{vocab}")
    for layers, stages, vocab in itertools.product(range(1, 9), range(1, 5), (64, 8000, 200_000))
    if stages <= layers
]


@pytest.mark.parametrize(("layers", "stages", "vocab"), SPLITS)
def test_balance_minimises_the_most_loaded_stage(layers, stages, vocab):
    config = model(layers, vocab)
    bounds = balance(config, stages)
    splits = itertools.combinations(range(1, layers), stages - 1)
    best = min(max(loads(config, [0, *inner, layers])) for inner in splits)
    assert max(loads(config, bounds)) == best


@pytest.mark.parametrize(("layers", "stages", "vocab"), SPLITS)
def test_balance_gives_every_stage_a_block(layers, stages, vocab):
    bounds = balance(model(layers, vocab), stages)
    assert bounds[0] == 0
    assert bounds[-1] == layers
    assert len(bounds) == stages + 1
    assert all(first < end for first, end in itertools.pairwise(bounds))


def test_balance_gives_earlier_stages_more_among_equals():
    assert balance(model(5, 1), 2) == [0, 3, 5]


def test_balance_counts_the_head_with_the_last_stage():
    assert balance(model(8, 200_000), 2) == [0, 7, 8]


def test_describe_names_every_block_and_shares_add_up():
    config = model(6, 8000)
    text = describe(config, [0, 3, 5, 6])
    assert "stage 0: embedding + blocks 0-2" in text
    assert "stage 1: blocks 3-4" in text
    assert "stage 2: block 5 + head" in text
    shares = [int(part.split("(")[1].split("%")[0]) for part in text.split(";")]
    assert sum(shares) == pytest.approx(100, abs=2)
