"""Signals that ask a run to finish its step, save and end.

They are SIGTERM, SIGUSR1, SIGINT (Ctrl-C), and SIGHUP: its terminal is closed.
"""

import signal


class StopRequest:
    """Whether this process was asked to stop; the ranks agree on it after each step."""

    def __init__(self):
        self.requested = False
        for number in stop_signals(signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.requested = True


def stop_signals(*numbers: signal.Signals) -> list[signal.Signals]:
    """These and SIGHUP, unless that is ignored, as it is after nohup."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [*numbers, *([] if ignored else [signal.SIGHUP])]
