"""Variables that keep Triton from compiling are named; nothing else is taken for one."""

import pytest

from infini_ds.kernels import backend

NAMES = ("TRITON_INTERPRET", "TRITON_PTXAS_PATH", "TRITON_CACHE_DIR", "TRITON_HOME", "HOME")


@pytest.mark.parametrize(
    ("variables", "missing"),
    [
        ({}, ""),
        ({"TRITON_INTERPRET": "0"}, ""),
        ({"TRITON_INTERPRET": "1"}, "would interpret its kernels, as TRITON_INTERPRET says"),
        ({"TRITON_INTERPRET": "true"}, "would interpret its kernels"),
        ({"TRITON_PTXAS_PATH": "/bin/sh"}, ""),
        ({"TRITON_PTXAS_PATH": ""}, ""),
        ({"TRITON_PTXAS_PATH": "/none/ptxas"}, "finds no program at TRITON_PTXAS_PATH=/none/ptxas"),
        ({"TRITON_PTXAS_PATH": "{here}/text"}, "finds no program at TRITON_PTXAS_PATH="),
        ({"TRITON_CACHE_DIR": "{here}/new/cache"}, ""),
        ({"TRITON_CACHE_DIR": "{here}/text/cache"}, "cannot write {here}/text/cache; set TRITON_C"),
        ({"TRITON_CACHE_DIR": "{here}/text"}, "cannot write {here}/text; set TRITON_CACHE_DIR"),
        ({"TRITON_HOME": "{here}/text"}, "cannot write {here}/text/.triton/cache"),
        ({"HOME": "{here}/text"}, "cannot write {here}/text/.triton/cache; set TRITON_CACHE_DIR"),
        ({"HOME": "{here}/text", "TRITON_CACHE_DIR": "{here}"}, ""),
    ],
    ids=lambda value: " ".join(map("=".join, value.items())) if isinstance(value, dict) else "",
)
def test_variable_in_the_way_of_triton_is_named(monkeypatch, tmp_path, variables, missing):
    (tmp_path / "text").touch()
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(here=tmp_path))
    found = backend._variable_in_the_way()
    assert found.startswith(missing.format(here=tmp_path))
    assert bool(found) == bool(missing)
