"""Processes that do not meet say why."""

import socket
from datetime import timedelta

import pytest
import torch
from torch.distributed import DistNetworkError, DistStoreError, TCPStore

from infini_ds.errors import RunError, UserError
from infini_ds.parallel import build
from infini_ds.system.causes import cause

PORT = "in use on this machine"
LATE = "did not find each other within train.timeout = 9 s at 127.0.0.1 port {port}: "
# As PyTorch and gloo say it: (error, kind of ours, what the line has).
ERRORS = {
    "port_of_another": (
        DistNetworkError("The server socket has failed to listen on any local network address. "
                         "port: {port}, useIpv6: false, code: -98, name: EADDRINUSE, message: "
                         "address already in use"), UserError, PORT,
    ),
    "port_by_gloo": (RuntimeError("bind: address already in use"), UserError, PORT),
    "client": (
        DistNetworkError("The client socket has timed out after 9000ms while trying to connect "
                         "to (127.0.0.1, {port})."), RunError, LATE,
    ),
    "workers": (
        DistStoreError("Timed out after 9 seconds waiting for clients. 1/2 clients joined."),
        RunError, LATE,
    ),
    "barrier": (
        DistStoreError("wait timeout after 9000ms, keys: /default_pg/0//cpu//0"), RunError, LATE,
    ),
    "refused": (
        RuntimeError("Gloo connectFullMesh failed with connect: Connection refused"), RunError,
        "did not find each other at 127.0.0.1 port {port}: Gloo connectFullMesh failed",
    ),
    "other_server": (
        DistNetworkError("Ping failed, invalid value returned from server. Expected: 8116"),
        RunError, "did not find each other at 127.0.0.1 port {port}: Ping failed",
    ),
    "files": (RuntimeError("epoll_create: Too many open files"), RunError, "`ulimit -n`"),
    "level": (ValueError("The value of TORCH_DISTRIBUTED_DEBUG must be OFF"), UserError, "must be"),
    "address": (ValueError("Error initializing torch.distributed: bad url"), UserError, "bad url"),
    "threads": (RuntimeError("can't start new thread"), RunError, "`ulimit -u`"),
}  # fmt: skip


@pytest.fixture
def meeting(monkeypatch):
    port = "29500"
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    return port


@pytest.mark.parametrize("name", ERRORS)
def test_processes_that_do_not_meet_say_why(meeting, name):
    error, kind, has = ERRORS[name]
    told = build._not_started(error, 9.0)
    assert type(told) is kind
    assert has.format(port=meeting) in str(told)
    assert ("within train.timeout" in str(told)) == (has == LATE)
    if has == PORT:
        for way in ("port 29500", "--master_port", "--master-port", "MASTER_PORT"):
            assert way in str(told)


def test_port_that_another_program_has_is_known_by_what_pytorch_says(meeting):
    with socket.create_server(("", 0)) as server:
        with pytest.raises(DistNetworkError) as caught:
            TCPStore("127.0.0.1", server.getsockname()[1], 2, True, timedelta(seconds=3))
        assert PORT in str(build._not_started(caught.value, 9.0))


@pytest.mark.parametrize(
    ("name", "available", "devices", "rank", "refused"),
    [
        ("cpu", True, 1, 5, False), ("cuda", True, 2, 1, False), ("cuda", True, 2, 2, True),
        ("cuda", True, 1, 7, True), ("cuda", False, 0, 0, True),
    ],
)  # fmt: skip
def test_process_without_a_device_says_what_is_visible(
    monkeypatch, name, available, devices, rank, refused
):
    class Accelerator:
        def device_name(self):
            return name

        def is_available(self):
            return available

        def device_count(self):
            return devices

    monkeypatch.setattr(build, "get_accelerator", Accelerator)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2")
    if not refused:
        build._check_device(rank)
        return
    with pytest.raises(UserError) as caught:
        build._check_device(rank)
    assert f"PyTorch sees {devices} there (CUDA_VISIBLE_DEVICES='1,2')" in str(caught.value)


def test_out_of_memory_is_an_error_that_is_known():
    assert issubclass(torch.OutOfMemoryError, RuntimeError)
    assert "train.micro_batch_size" in cause(torch.OutOfMemoryError("CUDA out of memory. Tried"))
