"""Handles the signals that ask a run to finish its step, save and end.

These are SIGTERM, SIGUSR1, SIGINT (Ctrl-C) and SIGHUP (the terminal was closed).
"""

import signal


class StopRequest:
    """Records whether this process was asked to stop; the ranks agree on it after each step."""

    def __init__(self):
        self.requested = False
        for number in stop_signals(signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.requested = True


def stop_signals(*numbers: signal.Signals) -> list[signal.Signals]:
    """Returns these signals and SIGHUP, unless SIGHUP is ignored, as it is under nohup."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [*numbers, *([] if ignored else [signal.SIGHUP])]
