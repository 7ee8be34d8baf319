"""Ends a rank that makes no progress, or whose peers are gone, and says why."""

import contextlib
import faulthandler
import os
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from infini_ds.config import RunConfig
from infini_ds.errors import RunError
from infini_ds.guard.limited import within
from infini_ds.guard.peers import BEAT_SECONDS, Peers, is_lost_contact
from infini_ds.runs import failures
from infini_ds.system.causes import cause, one_line

_GRACE_SECONDS = 3.0
"""Time for a rank to notice by itself that another one has ended."""
_WRITE_SECONDS = 20.0
"""Time limit for writing stacks and records, since the file system may be what hangs."""
_END_SECONDS = 120.0
"""Time limit for everything that is printed and written at the end."""


class Watchdog:
    """A thread that ends this rank in bounded time, whatever happens to the others.

    The limit, train.hang_timeout, applies from the end of the first step: before that, compiling
    and reading may take long, and train.timeout limits every wait for another rank. Must be
    constructed on all ranks together.
    """

    def __init__(self, config: RunConfig):
        self.step = 0
        self.waiting_for: Callable[[], str] = lambda: ""
        """Returns what the pipeline waits for, and from whom."""
        self._limit = config.train.hang_timeout or config.train.timeout / 2
        self._limit_name = "train.hang_timeout"
        self._timeout = config.train.timeout
        self._output_dir = Path(config.output_dir)
        self._done = "the start"
        self._since: float | None = None
        self._main = threading.get_ident()
        self._ending = threading.Lock()
        self._stopped = threading.Event()
        self._peers = Peers()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def progress(self, done: str) -> None:
        """Notes that some work is done, which restarts the limit."""
        self._done = done
        if self._since is not None:
            self._since = time.monotonic()

    def step_done(self, step: int) -> None:
        """Notes that a training step is done; the limit applies from the first one on."""
        self.step, self._done = step, f"step {step}"
        self._since = time.monotonic()

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """Raises the limit to train.timeout during work that takes long and reports no progress."""
        usual = self._limit, self._limit_name
        self._limit, self._limit_name = self._timeout, "train.timeout"
        try:
            yield
        finally:
            self._limit, self._limit_name = usual
            self.progress(self._done)

    def stop(self) -> None:
        """Ends the watch, because the run is over."""
        self._stopped.set()
        self._peers.stop()
        faulthandler.cancel_dump_traceback_later()

    def failed(self, error: Exception) -> RunError:
        """Records what ended this rank; returns the error in one line, with the lost ranks."""
        self._ending.acquire()  # never released: the thread must not end the process any more
        self._stopped.set()
        _end_in(_END_SECONDS)
        where = self._place(traceback.walk_tb(error.__traceback__))
        if is_lost_contact(error):
            others = self._peers.explain()
            text = f"lost another rank at step {self.step}, after {self._done}, {where}"
            text += f": {one_line(error)}"
            message = f"{text} ({others})" if others else text
        elif isinstance(error, RunError):
            message = str(error)
        elif known := cause(error):
            message = f"{known}, at step {self.step}, after {self._done}"
        elif isinstance(error, OSError):
            message = str(error)
        else:
            within(_WRITE_SECONDS, lambda: traceback.print_exception(error), None)
            kind = type(error).__name__
            message = f"{kind} at step {self.step}, after {self._done}, {where}: {one_line(error)}"
        self._finish(message, is_cause=not is_lost_contact(error))
        faulthandler.cancel_dump_traceback_later()
        return RunError(message)

    def _finish(self, message: str, is_cause: bool) -> None:
        self._peers.leave_word(message, is_cause)
        within(_WRITE_SECONDS, lambda: failures.record(self._output_dir, self.step, message), None)
        self._peers.linger()

    def _watch(self) -> None:
        alarm_since = None
        while not self._stopped.wait(BEAT_SECONDS):
            now = time.monotonic()
            if self._since is not None:
                # A hang that holds Python's lock blocks this thread, but not that timer.
                _end_in(2 * self._limit)
                if now - self._since > self._limit:
                    self._end(f"got nothing done for {self._limit_name} = {self._limit:g} s")
            if self._peers.alarm:
                alarm_since = alarm_since or now
                if now - alarm_since > _GRACE_SECONDS:
                    self._end(self._peers.alarm)

    def _end(self, reason: str) -> None:
        if not self._ending.acquire(blocking=False):
            return
        # This thread may hang as well, for example on a file system that does not respond.
        _end_in(_END_SECONDS)
        frames = sys._current_frames()
        where = self._place(reversed(list(traceback.walk_stack(frames[self._main]))))
        waiting = self.waiting_for()
        waiting = f", waiting for {waiting}" if waiting else ""
        message = f"{reason} at step {self.step}, after {self._done}{waiting}, {where}"
        others = self._peers.explain()
        message = f"{message} ({others})" if others else message
        stacks = within(_WRITE_SECONDS, lambda: self._write_stacks(message), None)
        message += f"; stacks are in {stacks}" if stacks else ""
        self._finish(message, is_cause=False)
        line = f"infini-ds rank {dist.get_rank()}: {message}"
        within(_WRITE_SECONDS, lambda: print(line, file=sys.stderr, flush=True), None)
        os._exit(1)

    def _write_stacks(self, message: str) -> Path:
        path = self._output_dir / "stacks" / f"rank_{dist.get_rank()}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w") as file:
            print(message, file=file, flush=True)
            faulthandler.dump_traceback(file, all_threads=True)
            spy = shutil.which("py-spy")
            if spy:
                command = [spy, "dump", "--native", "--pid", str(os.getpid())]
                with contextlib.suppress(subprocess.TimeoutExpired):
                    subprocess.run(command, stdout=file, stderr=file, timeout=10, check=False)
        return path

    def _place(self, frames: Iterator[tuple[FrameType, int]]) -> str:
        """Finds the innermost frame in this package; reads no source, whose disk may not answer."""
        own = Path(__file__).parents[1]
        stack = traceback.StackSummary.extract(frames, lookup_lines=False)
        inner = [frame for frame in stack if own in Path(frame.filename).parents]
        if not inner:
            return "in an unknown place"
        return f"in {inner[-1].name} ({Path(inner[-1].filename).name}:{inner[-1].lineno})"


def _end_in(seconds: float) -> None:
    """Ends the process after `seconds`, unless called again before."""
    # Each call starts a thread. If that fails now, the next call may succeed.
    with contextlib.suppress(RuntimeError):
        faulthandler.dump_traceback_later(seconds, exit=True)
