import os

import pytest

from infini_ds.system.resources import keep_freed_memory


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        pytest.param({}, "expandable_segments:True", id="nothing"),
        pytest.param(
            {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "backend:native", id="old_name"
        ),
        pytest.param({"PYTORCH_ALLOC_CONF": "backend:native"}, None, id="new_name"),
    ],
)
def test_segments_grow_unless_the_allocator_is_set(monkeypatch, found, expected):
    monkeypatch.setattr(os, "environ", dict(found))
    keep_freed_memory()
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == expected
