"""Which ptxas assembles the kernels, by fakes in the place of Triton's and pip's."""

import os
import re

import pytest
import triton
from triton import knobs
from triton.backends.nvidia.compiler import get_ptxas

from infini_ds.kernels.assembler import PACKAGE, REMEDY, choose_ptxas

VARIABLES = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")
OWN = f"Triton {triton.__version__}"


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Writes a ptxas of a version; there is none of pip's."""
    for variable in VARIABLES:
        monkeypatch.setenv(variable, "")  # so that what is set goes again
        monkeypatch.delenv(variable)

    def write(name: str, version: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        release = ".".join(version.split(".")[:2])
        path.write_text(f"#!/bin/sh\necho 'tools, release {release}, V{version}'\n")
        path.chmod(0o755 if version else 0o644)
        return str(path)

    return write


def install(fake, tmp_path, monkeypatch, version: str) -> str:
    """As pip would; a version of "" does not run."""
    path = fake("site/nvidia/cu13/bin/ptxas", version)
    record = tmp_path / f"site/nvidia_cuda_nvcc-{version or '13.9.9'}.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 1\n")
    (record / "RECORD").write_text("nvidia/cu13/bin/nvcc,,\nnvidia/cu13/bin/ptxas,,\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return path


@pytest.mark.parametrize(
    ("capability", "own", "packaged", "named", "version", "origin"),
    [
        (90, "12.8.93", None, None, "12.8.93", OWN),
        (90, "12.8.93", "13.5.37", None, "13.5.37", PACKAGE),
        (90, "12.8.93", "13.0.88", None, "13.0.88", PACKAGE),
        (90, "12.8.93", "12.8.61", None, "12.8.93", OWN),
        (90, "12.9.86", "12.10.1", None, "12.10.1", PACKAGE),
        (90, "13.4.59", None, None, "13.4.59", OWN),
        (90, "13.4.59", "13.3.33", None, "13.4.59", OWN),
        (90, "13.4.59", "13.5.37", None, "13.5.37", PACKAGE),
        (90, "12.8.93", "", None, "12.8.93", OWN),
        (90, "12.8.93", "13.5.37", "13.3.73", "13.3.73", "TRITON_PTXAS"),
        (90, "13.4.59", "13.5.37", "12.9.86", "12.9.86", "TRITON_PTXAS"),
        (80, "12.8.93", "13.5.37", None, "12.8.93", OWN),
        (89, "12.8.93", "13.5.37", None, "12.8.93", OWN),
        (100, "12.9.86", "13.5.37", None, "12.9.86", OWN),
        (120, "12.9.86", "13.5.37", None, "12.9.86", OWN),
    ],
)
def test_newer_one_of_pip_is_taken_for_hopper(
    fake, tmp_path, monkeypatch, capability, own, packaged, named, version, origin
):
    for tool in ("ptxas", "ptxas_blackwell"):
        monkeypatch.setattr(vars(type(knobs.nvidia))[tool], "default_path", fake(tool, own))
    if packaged is not None:
        path = install(fake, tmp_path, monkeypatch, packaged)
    if named:
        for variable in VARIABLES:
            monkeypatch.setenv(variable, fake(variable, named))
    chosen = choose_ptxas(capability)
    assert chosen == choose_ptxas(capability)  # what it has set is no variable of the user's
    assert chosen.version == version
    assert chosen.origin.startswith(origin)
    if origin == PACKAGE:
        assert get_ptxas(capability).path == path
    wrong = capability == 90 and version in ("12.8.93", "13.0.88", "12.10.1", "12.9.86")
    assert chosen.warning.endswith(f"before 13.3; {REMEDY}") == wrong
    assert bool(chosen.fault) == bool(chosen.warning) == wrong


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_triton_says_which_of_its_own(fake, capability):
    chosen = choose_ptxas(capability)
    assert re.fullmatch(r"1[23]\.\d+\.\d+", chosen.version)
    assert chosen.version.startswith(f"{get_ptxas(capability).version}.")
    if chosen.origin == OWN:
        assert not [variable for variable in VARIABLES if variable in os.environ]
