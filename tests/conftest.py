"""Every session has its own folder for compiled operators, one thread a process and no GPU."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.fault_table import pytest_terminal_summary, trial  # noqa: F401

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


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config, items):
    # Where workers share the tests (-n 2 --dist loadgroup), the runs of a file are made once, and
    # the hosts of the cluster belong to one worker.
    for item in items:
        path = item.path.relative_to(config.rootpath)
        group = "cluster" if Path("tests/cluster") in path.parents else str(path)
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_unconfigure(config):
    shutil.rmtree(config.extensions_dir, ignore_errors=True)
