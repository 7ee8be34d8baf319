"""Errors of the system and of libraries are told with what helps."""

import errno
import os
import resource

import numpy as np
import pytest

from infini_ds.system import exit_code
from infini_ds.system.causes import cause, one_line


def of_system(number: int) -> OSError:
    return OSError(number, os.strerror(number), "/data/file")


# (error, what the line has); those of libraries are as they were seen.
KNOWN = {
    "full": (of_system(errno.ENOSPC), "/data/file: No space left on device; make room there"),
    "quota": (of_system(errno.EDQUOT), "this user's quota is used up"),
    "read_only": (of_system(errno.EROFS), "Read-only file system; name another place"),
    "permission": (of_system(errno.EACCES), "Permission denied; give this user the right"),
    "files": (of_system(errno.EMFILE), "`ulimit -n`"),
    "files_of_all": (of_system(errno.ENFILE), "Too many open files"),
    "memory": (MemoryError(), "MemoryError; the host's memory is full"),
    "memory_of_a_fork": (of_system(errno.ENOMEM), "the host's memory is full"),
    "threads": (RuntimeError("can't start new thread"), "`ulimit -u`"),
    "processes": (of_system(errno.EAGAIN), "`ulimit -u`"),
    "library_that_is_not_mapped": (
        ImportError("libx.so: failed to map segment from shared object"), "`ulimit -v`",
    ),
    "memory_of_torch": (
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate "
            "memory: you tried to allocate 4000000000000 bytes. Error code 12"
        ),
        "the host's memory is full",
    ),
    "memory_of_a_gpu": (
        RuntimeError(
            "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 "
            "GiB of which 2.00 MiB is free. " + "Including non-PyTorch memory, " * 20
        ),
        "train.micro_batch_size",
    ),
    "memory_of_cublas": (
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        "train.activation_checkpointing=block",
    ),
    "write_of_numpy": (OSError("131072 requested and 4064 written"), "most often the disk is full"),
    "write_of_torch": (
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
        "most often the disk is full",
    ),
    "write_of_safetensors": (
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
        "make room there",
    ),
    "shared_memory": (
        RuntimeError("Error while creating shared memory segment /dev/shm/nccl-x (size 9637888)"),
        "--shm-size",
    ),
    "sockets_of_gloo": (
        RuntimeError("loop.cc:105] fd_ != -1. epoll_create: Too many open files"), "`ulimit -n`",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_known_error_is_told_with_what_helps(name):
    error, helps = KNOWN[name]
    told = cause(error)
    assert helps in told
    assert "\n" not in told
    assert len(told) < 600


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), FileNotFoundError(2, "No such file", "x"), RuntimeError("shapes differ"),
     ValueError("out of range"), RuntimeError("out of resource: shared memory, Required: 270336")],
    ids=repr,
)  # fmt: skip
def test_nothing_is_made_up_of_others(error):
    assert cause(error) == ""


@pytest.mark.parametrize(
    ("said", "line"),
    [
        (ValueError("one\n\n  and   two\n"), "one and two"),
        (" one\ttwo ", "one two"),
        ("", ""),
        (AssertionError(), "AssertionError"),
        (of_system(errno.ENOSPC), "/data/file: No space left on device"),
        (OSError(errno.EAGAIN, "Try again"), "Try again"),
        (OSError("131072 requested\nand 4064 written"), "131072 requested and 4064 written"),
    ],
    ids=repr,
)
def test_anything_is_told_in_one_line(said, line):
    assert one_line(said) == line


def full_disk():
    with open("/dev/full", "w") as full:
        np.zeros(100_000).tofile(full)


def no_memory():
    np.zeros(1 << 60, dtype=np.uint8)


def no_files():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(highest, before[0]), before[1]))
    try:
        while True:
            kept.append(open(os.devnull))  # noqa: SIM115
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for file in kept:
            file.close()
        kept.clear()


def no_threads():
    raise RuntimeError("can't start new thread")


kept: list = []


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (full_disk, "requested and 0 written; most often the disk is full: make room there"),
        (no_memory, "the host's memory is full"),
        (no_files, "/dev/null: Too many open files; `ulimit -n` allows no more"),
        (no_threads, "can't start new thread; `ulimit -u`"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_command_that_the_system_ends_says_why_in_one_line(capfd, command, line):
    assert exit_code.exit_code(command) == 1
    (told,) = capfd.readouterr().err.splitlines()
    assert told.startswith("infini-ds: ")
    assert line in told


@pytest.mark.parametrize(
    "error",
    [
        ValueError("The value of TORCH_SOME_LEVEL must be OFF, INFO, or DETAIL."),
        ValueError("invalid literal for TORCH_SOME_LEVEL"),
        RuntimeError("TORCH_SOME_LEVEL=7 is no level"),
    ],
    ids=str,
)
def test_variable_that_a_library_refuses_is_told_with_its_value(monkeypatch, capsys, error):
    def command():
        raise error

    monkeypatch.setenv("TORCH_SOME_LEVEL", "7")
    assert exit_code.exit_code(command) == 2
    assert f"variable TORCH_SOME_LEVEL='7': {error}\n" in capsys.readouterr().err
    monkeypatch.delenv("TORCH_SOME_LEVEL")
    with pytest.raises(type(error)):
        exit_code.exit_code(command)
