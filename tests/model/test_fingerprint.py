"""One model, one fingerprint."""

import torch

from infini_ds.model.fingerprint import fingerprint


def test_is_that_of_weights_and_shape_alone(make_model):
    model = make_model()
    assert fingerprint(model) == fingerprint(make_model())
    assert fingerprint(model) != fingerprint(make_model(memory_rule="delta"))
    assert fingerprint(model) != fingerprint(make_model().to(torch.bfloat16))
    with torch.no_grad():
        model.blocks[1].self_attn.beta[0] += 1e-6  # type: ignore[union-attr, operator]
    assert fingerprint(model) != fingerprint(make_model())
