"""The timer of a CUDA device, on a device and with a clock that are made up."""

import pytest
import torch

from infini_ds.benchmarks import cuda_timer
from infini_ds.benchmarks.cuda_timer import CudaTimer

PAUSE = 1e-3


class Device:
    """Works off its queue while the host goes on; both have the same clock."""

    def __init__(self):
        self.host = 0.0
        self.free_at = 0.0
        self.pauses = 0

    def queue(self, seconds: float) -> None:
        self.free_at = max(self.free_at, self.host) + seconds

    def synchronize(self) -> None:
        self.host = max(self.host, self.free_at)

    def pause(self) -> None:
        self.pauses += 1
        self.queue(PAUSE)

    def call(self, host: float, device: float, first: float = 0.0):
        """One that takes `host` to start all its kernels, the device idle between them."""
        calls = iter([first])

        def start() -> None:
            self.host += next(calls, 0.0)
            for _ in range(10):
                self.host += host / 10
                self.queue(device / 10)

        return start


@pytest.fixture
def device(monkeypatch):
    made = Device()

    class Event:
        def __init__(self, enable_timing):
            self.at = 0.0

        def record(self):
            self.at = max(made.free_at, made.host)

        def synchronize(self):
            made.host = max(made.host, self.at)

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    class Buffer:
        zero_ = staticmethod(made.pause)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", made.synchronize)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda_timer.torch, "empty", lambda *_, **__: Buffer)
    monkeypatch.setattr(cuda_timer.time, "perf_counter", lambda: made.host)
    return made


@pytest.mark.parametrize(
    ("host", "on_device"),
    [(0.0, 2e-3), (1e-3, 2e-3), (2e-3, 2e-4), (5e-3, 1e-4), (2e-2, 1e-3)],
)
def test_the_hosts_part_of_an_operation_is_hidden(device, host, on_device):
    assert CudaTimer()(device.call(host, on_device)) == pytest.approx(on_device)
    assert CudaTimer(hides_host=False)(device.call(host, on_device)) == pytest.approx(
        max(host + on_device / 10, on_device + host / 10)
    )


def test_the_device_is_kept_busy_no_longer_than_its_queue_holds(device):
    CudaTimer(repeats=1)(device.call(5.0, 1e-3))
    assert device.pauses == 11 + cuda_timer.MOST_PAUSES


@pytest.mark.parametrize(
    ("seconds", "calls"), [(1e-3, 30), (0.5, 17), (6.0, 1), (40.0, 1)], ids=str
)
def test_a_contestant_ends_within_its_limit(device, seconds, calls):
    """Beside the call that compiles and the one after it, or what one call takes."""
    counted = []
    call = device.call(0.0, seconds, first=60.0)
    CudaTimer(seconds=10.0)(lambda: counted.append(call()))
    assert len(counted) == pytest.approx(2 + calls, abs=2)
    most = 60 + seconds + max(10.0, 2 * seconds)
    assert device.host <= most + 1


def test_compiling_does_not_count(device):
    assert CudaTimer(repeats=3)(device.call(0.0, 1e-3, first=60.0)) == pytest.approx(1e-3)


def test_once_is_one_call(device):
    counted = []
    call = device.call(1e-3, 20.0)
    assert CudaTimer().once(lambda: counted.append(call())) == pytest.approx(20, rel=1e-2)
    assert len(counted) == 1
