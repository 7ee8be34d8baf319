"""CUDA_VISIBLE_DEVICES as others have set it, in the words of DeepSpeed's launcher."""

import os

import pytest

from infini_ds.cluster import devices
from infini_ds.errors import UserError

UUIDS = ["8932f937-d72c-4106-c12f-20bd9faed9f6", "8932aaaa-1111", "GPU-77aa0001-2222"]
NAMES = ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")


@pytest.fixture
def translated(monkeypatch):
    """The two variables as the launcher gets them, on a machine with these GPUs."""

    def translate(value: str | None, accelerator: str | None, gpus: list[str]):
        for name, given in zip(NAMES, (value, accelerator), strict=True):
            monkeypatch.setenv(name, given or "")
            if given is None:
                monkeypatch.delenv(name)
        monkeypatch.setattr(devices, "_uuids", lambda: gpus)
        devices.translate_visible_devices()
        return tuple(os.environ.get(name) for name in NAMES)

    return translate


@pytest.mark.parametrize(
    ("value", "accelerator", "gpus", "expected"),
    [
        pytest.param(None, None, UUIDS, (None, None), id="not_set"),
        pytest.param("3", "cpu", UUIDS, (None, "cpu"), id="number_on_the_cpu"),
        pytest.param("GPU-8932f937", "cpu", [], (None, "cpu"), id="uuid_on_the_cpu"),
        pytest.param("nonsense", "cpu", [], (None, "cpu"), id="nonsense_on_the_cpu"),
        pytest.param("", "cpu", [], (None, "cpu"), id="empty_on_the_cpu"),
        pytest.param("0", None, [], (None, None), id="number_without_gpus"),
        pytest.param("2,5", None, [], (None, None), id="numbers_without_gpus"),
        pytest.param("", None, UUIDS, (None, "cpu"), id="empty"),
        pytest.param("-1", None, UUIDS, (None, "cpu"), id="minus_one"),
        pytest.param("NoDevFiles", None, UUIDS, (None, "cpu"), id="slurms_word_for_none"),
        pytest.param("1", None, UUIDS, ("1", None), id="number"),
        pytest.param("2, 0", "cuda", UUIDS, ("2,0", "cuda"), id="order_and_blanks"),
        pytest.param("GPU-8932f937", None, UUIDS, ("0", None), id="beginning_of_a_uuid"),
        pytest.param("GPU-77aa0001-2222,1", None, UUIDS, ("2,1", None), id="uuid_and_number"),
    ],
)
def test_launcher_sees_what_cuda_would_see(translated, value, accelerator, gpus, expected):
    assert translated(value, accelerator, gpus) == expected


@pytest.mark.parametrize(
    ("value", "accelerator", "message"),
    [
        ("3", None, "'3' is not a GPU of this machine; it has 3, from 0 to 2"),
        ("0,7", None, "'7' is not a GPU of this machine"),
        ("GPU-8932", None, "'GPU-8932' is not a GPU of this machine"),
        ("GPU-ffff", None, "'GPU-ffff' is not a GPU"),
        ("MIG-8932f937-d72c", None, "For parts of GPUs (MIG) start the run with torchrun"),
        ("0,abc", None, "'abc' is not a GPU"),
        ("8932f937", None, "'8932f937' is not a GPU"),
        ("-1", "cuda", "hides all GPUs, and DS_ACCELERATOR is cuda; unset one of them"),
    ],
)
def test_what_the_launcher_cannot_name_is_refused(translated, value, accelerator, message):
    with pytest.raises(UserError) as refused:
        translated(value, accelerator, UUIDS)
    assert str(refused.value).startswith(f"environment variable CUDA_VISIBLE_DEVICES={value!r}: ")
    assert message in str(refused.value)
