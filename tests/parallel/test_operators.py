"""An operator that cannot be compiled is told by what is missing."""

import os
import shutil
import sys
import sysconfig
import threading
from pathlib import Path

import pytest
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder

from infini_ds.errors import UserError
from infini_ds.parallel.deepspeed.operators import CpuAdam, build_async_io, build_cpu_adam

COMPILING = (
    "Error building extension 'cpu_adam': [1/3] c++ -MMD -MF cpu_adam.o.d\n"
    "FAILED: cpu_adam.o\nx.cpp:3:10: fatal error: {}\ncompilation terminated.\nninja: stopped"
)
REASONS = {
    "ninja": (None, "as there is no ninja (pip install ninja)"),
    "compiler": (None, "as there is no C++ compiler none-such-c++ (apt-get install g++, or set"),
    "headers": (None, "has no Python.h (apt-get install python3-dev)"),
    "source": (RuntimeError(COMPILING.format("omp.h: No such file")), "x.cpp:3:10: fatal error: o"),
    "full": (RuntimeError(COMPILING.format("cpu_adam.o: No space left on device")), "make room"),
    "memory": (RuntimeError("c++: fatal error: Killed signal terminated program"), "Killed signal"),
    "hardware": (RuntimeError("Unable to JIT load the cpu_adam op due to it not being compatible"),
                 "not being compatible"),
    "load": (ImportError("cpu_adam.so: cannot open shared object file"), "cannot open shared obj"),
    "version": (ImportError("cpu_adam.so: undefined symbol: _ZN3c10"), "undefined symbol"),
    "permission": (PermissionError(13, "Permission denied", "/x/lock"), "TORCH_EXTENSIONS_DIR"),
    "read_only": (OSError(30, "Read-only file system", "/x/lock"), "TORCH_EXTENSIONS_DIR"),
}  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", os.environ["PATH"])  # so that it is put back
    return tmp_path / "cpu_adam"


@pytest.mark.parametrize("name", REASONS)
def test_reason_is_told_in_one_line(monkeypatch, place, name):
    error, reason = REASONS[name]

    def fail(self, verbose):
        raise error or RuntimeError("Ninja is required to load C++ extensions")

    monkeypatch.setattr(CPUAdamBuilder, "load", fail)
    which = shutil.which
    if name == "ninja":
        monkeypatch.setattr(shutil, "which", lambda program: program != "ninja" and which(program))
    elif name == "compiler":
        monkeypatch.setenv("CXX", "none-such-c++ -m64")
    elif name == "headers":
        monkeypatch.setattr(sysconfig, "get_path", lambda scheme: str(place))
    with pytest.raises(UserError) as caught:
        build_cpu_adam()
    told = str(caught.value)
    assert told.startswith("parallel.offload_optimizer: DeepSpeed's CPU Adam cannot be compiled, ")
    assert reason in told
    assert "\n" not in told


def test_place_that_cannot_be_made_is_told_with_the_variable(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"set the variable TORCH_EXTENSIONS_DIR"):
        build_cpu_adam()


def test_missing_libaio_is_told(monkeypatch):
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose: False)
    with pytest.raises(UserError) as caught:
        build_async_io()
    told = str(caught.value)
    assert told.startswith("parallel.nvme_path: DeepSpeed's operator for disks cannot be compiled")
    assert told.endswith("(apt-get install libaio-dev)")


def test_ninja_beside_the_interpreter_is_found(monkeypatch, place):
    found = []
    monkeypatch.setattr(
        CPUAdamBuilder, "load", lambda *_, **__: found.append(shutil.which("ninja"))
    )
    monkeypatch.setenv("PATH", "/none")
    build_cpu_adam()
    assert found == [str(Path(sys.executable).with_name("ninja"))]
    assert os.environ["PATH"].startswith("/none:")


def test_lock_of_a_dead_process_is_removed(monkeypatch, place):
    there = []
    monkeypatch.setattr(
        CPUAdamBuilder, "load", lambda *_, **__: there.append((place / "lock").exists())
    )
    place.mkdir()
    (place / "lock").touch()
    build_cpu_adam()
    assert there == [False]


def test_processes_compile_one_after_another(monkeypatch, place):
    at_once, most = [], []

    def load(self, verbose):
        (place / "lock").touch()  # as PyTorch has it; nobody else may remove it
        at_once.append(self)
        threading.Event().wait(0.1)
        most.append(len(at_once))
        at_once.pop()
        (place / "lock").unlink()

    monkeypatch.setattr(CPUAdamBuilder, "load", load)
    threads = [threading.Thread(target=build_cpu_adam) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1]


@pytest.mark.slow  # it compiles the operator
def test_update_depends_on_the_step_alone():
    """So that a run that is resumed from a checkpoint equals one that is not."""
    weights = []
    build_cpu_adam()
    gradients = torch.randn(40, 64)
    for stops in ((), (7, 23)):
        weight = torch.linspace(-1, 1, 64)
        optimizer = CpuAdam([weight], lr=1e-2, betas=(0.9, 0.95))
        for step, gradient in enumerate(gradients):
            if step in stops:
                state = optimizer.state[weight]
                optimizer = CpuAdam([weight], lr=1e-2, betas=(0.9, 0.95))
                optimizer.state[weight] = state
            weight.grad = gradient.clone()
            optimizer.step()
        weights.append(weight)
    assert torch.equal(*weights)
    assert (weights[0] - torch.linspace(-1, 1, 64)).abs().max() > 1e-2
