"""A conversation with one host: requests and answers with a time limit."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from infini_ds.cluster.preflight_host import MARK
from infini_ds.cluster.way import Way

_END_SECONDS = 5.0
_SSH_FAILED = 255
_OF_SRUN = re.compile(r"srun: error: \S+: task")
"""srun prints this after all other messages, to say how a task has ended."""


class HostLost(Exception):
    """A host does not answer, or stopped answering; `remedy` says what to do about it."""

    def __init__(self, what: str, remedy: str):
        super().__init__(what)
        self.remedy = remedy


class Session:
    """A context manager; the process on the host ends with it, or when this process does.

    Args:
        way: the way to the host.
        limit: time limit for each answer, in seconds.
    """

    def __init__(self, way: Way, limit: float):
        self._way, self._limit = way, limit
        self._expired = False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        # It gets its own process group: children of ssh would keep the pipe open if only ssh were
        # killed.
        self._process = subprocess.Popen(
            way.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # type: ignore[union-attr]
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
        self._kill()
        self._process.wait()
        self._process.stdout.close()  # type: ignore[union-attr]
        self._errors.close()

    def wait_until_ready(self) -> None:
        """Waits until the host listens.

        Raises:
            HostLost: it does not answer.
        """
        self._answer()

    def ask(self, what: str, **arguments: Any) -> Any:
        """Returns the answer to one of preflight_host's requests.

        Raises:
            HostLost: it does not answer.
        """
        request = json.dumps({"ask": what, **arguments})
        with contextlib.suppress(BrokenPipeError):
            print(request, file=self._process.stdin, flush=True)
        return self._answer()

    def clock(self) -> dict[str, float]:
        """Returns the seconds that the host's clock is "ahead", and "within" what error.

        Raises:
            HostLost: it does not answer.
        """
        found = []
        for _ in range(3):
            asked, began = time.time(), time.monotonic()
            told = self.ask("clock")
            half_trip = (time.monotonic() - began) / 2
            found.append({"within": half_trip, "ahead": told - asked - half_trip})
        return min(found, key=lambda each: each["within"])

    def _answer(self) -> Any:
        watchdog = threading.Timer(self._limit, self._expire)
        watchdog.start()
        try:
            for line in self._process.stdout:  # type: ignore[union-attr]
                if line.startswith(MARK):
                    return json.loads(line[len(MARK) :])
            code = self._process.wait()
        finally:
            watchdog.cancel()
        raise self._lost(code)

    def _lost(self, code: int) -> HostLost:
        if self._expired:
            what = f"no answer within {self._limit:g} s"
            return HostLost(what, "look there for a file system or a network that hangs")
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        said = [line for line in lines if not _OF_SRUN.match(line)]
        last = said[-1] if said else "no message"
        what = f"{last} (exit code {code})"
        if self._way.remedy and (code == _SSH_FAILED or last.startswith("srun: error")):
            return HostLost(what, self._way.remedy)
        return HostLost(what, f"{sys.executable} and {Path.cwd()} must exist there as they do here")

    def _expire(self) -> None:
        self._expired = True
        self._kill()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
