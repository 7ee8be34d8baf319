"""Blocks are compiled before the first step, or it is said what is missing."""

import re

import pytest
import torch

from infini_ds.errors import UserError
from infini_ds.model.transformer import InfiniTransformer
from infini_ds.training import compiled
from tests import tiny

CONFIG = tiny.run_config(
    model__vocab_size=61, train__window_segments=4, train__chunks=2, train__micro_batch_size=2,
    train__batch_size=2, train__dtype="fp32",
)  # fmt: skip
TOLD = "train.compile: blocks cannot be compiled, {}; with false they are computed as they are"


def test_steps_of_the_run_compile_nothing():
    from torch._dynamo.utils import counters  # importing it takes seconds

    torch._dynamo.reset()
    counters.clear()
    compiled.compile_blocks(CONFIG)
    graphs = counters["stats"]["unique_graphs"]
    model = InfiniTransformer(CONFIG.model).train()
    for block in model.blocks:
        block.compiled = True
    model.loss(torch.zeros(2, 17, dtype=torch.long)).backward()
    assert counters["stats"]["unique_graphs"] == graphs == 2
    torch._dynamo.reset()


def test_missing_compiler_is_told_at_once(monkeypatch):
    monkeypatch.setenv("CXX", "none-such-c++")
    monkeypatch.setattr(compiled, "_compile", None)
    missing = "as there is no C++ compiler none-such-c++ (apt-get install g++, or set CXX)"
    with pytest.raises(UserError, match=re.escape(TOLD.format(missing))):
        compiled.compile_blocks(CONFIG)


def test_error_of_the_compiler_is_told_in_one_line(monkeypatch):
    def fail(*_):
        raise RuntimeError("CppCompileError: C++ compile error\n\nOutput:\nx.cpp:1: error: no")

    monkeypatch.setattr(compiled, "_compile", fail)
    said = "CppCompileError: C++ compile error Output: x.cpp:1: error: no"
    with pytest.raises(UserError, match=re.escape(TOLD.format(said))):
        compiled.compile_blocks(CONFIG)
