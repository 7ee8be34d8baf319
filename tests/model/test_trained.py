"""Parameters that a run trains, chosen by the patterns of optimizer.train."""

import pytest

from infini_ds.config import OptimizerConfig
from infini_ds.errors import UserError
from infini_ds.model.layers import count_parameters
from infini_ds.model.trained import is_trained, trained_counts, trained_groups
from tests import tiny

CONFIG = tiny.model_config(vocab_size=11, num_layers=2, memory={"write_gate": True})


def groups(patterns: list[str], name: str = "adamw") -> set[str]:
    return trained_groups(CONFIG, OptimizerConfig(train=patterns, name=name))


def test_all_are_trained_without_patterns():
    assert sum(trained_counts(CONFIG, [])) == count_parameters(CONFIG)
    assert groups([]) == {"weights", "no_decay", "gates"}


def test_patterns_stand_for_whole_names():
    assert is_trained("layers.1.self_attn.beta", ["*.beta"])
    assert is_trained("layers.1.self_attn.beta", ["layers.2.*", "layers.1.self_attn.beta"])
    assert not is_trained("layers.1.self_attn.beta", ["beta", "*.Beta", "layers.1"])


def test_trained_parameters_are_counted_by_layers():
    counts = trained_counts(CONFIG, ["*.beta", "layers.2.*norm.weight", "layers.3.weight"])
    assert counts == [0, 2, 2 + 2 * 16, 16, 0]
    assert groups(["*.beta"]) == {"gates"}
    assert groups(["layers.0.weight", "*.write_gate.*"]) == {"no_decay"}
    assert groups(["layers.4.*", "*.beta"]) == {"weights", "gates"}
    assert groups(["layers.4.*", "*.beta"], "muon") == {"no_decay", "gates"}


def test_a_pattern_for_nothing_is_named_with_what_there_is():
    with pytest.raises(UserError, match=r"optimizer.train: '\*gates' is the name of no parameter"):
        trained_counts(CONFIG, ["*.beta", "*gates"])
    with pytest.raises(UserError, match=r"names are layers.0.weight, layers.1.*self_attn.beta"):
        trained_counts(CONFIG, ["layers.5.*"])
