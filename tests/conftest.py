"""Every session has its own folder for compiled operators, one thread a process and no GPU."""

import os
import shutil
import tempfile

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.fault_table import pytest_terminal_summary, trial  # noqa: F401
from tests.needs import pytest_collection_modifyitems  # noqa: F401

# What a launcher would have set: a test's processes get their own.
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def pytest_configure(config):
    # DeepSpeed compiles into a folder of the user's by default, where a killed process leaves a
    # lock that hangs every later one.
    config.extensions_dir = tempfile.mkdtemp(prefix="infini_ds_tests_extensions_")
    os.environ["TORCH_EXTENSIONS_DIR"] = config.extensions_dir
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in _LAUNCHER:
        os.environ.pop(name, None)


class _FilesTogether(LoadScopeScheduling):
    """A file's tests stay in one worker, which makes their runs once; so do all of a cluster's."""

    def _split_scope(self, nodeid: str) -> str:
        cluster = "tests/cluster/"
        return cluster if nodeid.startswith(cluster) else nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return _FilesTogether(config, log)


def pytest_unconfigure(config):
    shutil.rmtree(config.extensions_dir, ignore_errors=True)


@pytest.fixture
def _fp64(monkeypatch):
    """Everything that asks for fp32 gets fp64."""
    import torch  # the tests of commands that load no torch begin here too

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch, "float32", torch.float64)
    yield
    torch.set_default_dtype(default)
