"""The memory rules of exports, which stand alone, are those of the package."""

import pytest
import torch

from infini_ds.memory import RULES

BATCH, N, HEADS, KV_HEADS, D = 2, 141, 4, 2, 16


def segment() -> tuple[torch.Tensor, ...]:
    """Queries, keys, values, and write weights of which some are 0."""
    q = torch.randn(BATCH, N, HEADS, D)
    k, v = torch.randn(2, BATCH, N, KV_HEADS, D)
    return q, k, v, (torch.rand(BATCH, N, KV_HEADS) * 1.5 - 0.25).clamp(0, 1)


@pytest.mark.parametrize("name", RULES)
def test_segments_are_written_and_read_as_by_the_package(name):
    from infini_ds.conversion.hf import layers_infini

    assert layers_infini.RULES.keys() == RULES.keys()
    torch.manual_seed(0)
    rule, theirs = RULES[name], layers_infini.RULES[name]()
    memory, kv, norm = rule.empty(BATCH, KV_HEADS, D), None, None
    for _ in range(4):
        q, k, v, w = segment()
        memory = rule.write(memory, rule.features(k), w, v)
        features = theirs.features(k).transpose(1, 2)
        kv, norm = theirs.write(kv, norm, features, w.transpose(1, 2)[..., None], v.transpose(1, 2))
        torch.testing.assert_close(kv, memory.kv, rtol=1e-4, atol=1e-4)
        assert (norm is None) == (not rule.divides)
        if norm is not None:
            torch.testing.assert_close(norm, memory.norm)
        read, written = theirs.read(theirs.features(q.unflatten(2, (KV_HEADS, -1))), kv, norm)
        expected = rule.read(rule.features(q), memory)
        torch.testing.assert_close(read.flatten(2, 3), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(written, rule.written(memory))
        assert written.all()


@pytest.mark.parametrize("name", RULES)
def test_a_segment_of_which_nothing_is_written_leaves_nothing_to_read(name):
    from infini_ds.conversion.hf import layers_infini

    _, k, v, w = segment()
    rule = layers_infini.RULES[name]()
    kv, norm = rule.write(
        None, None, rule.features(k).transpose(1, 2), 0 * w.transpose(1, 2)[..., None],
        v.transpose(1, 2),
    )  # fmt: skip
    assert not kv.any()
    assert not rule.read(rule.features(k)[:, :, :, None], kv, norm)[1].any()
