"""SIGTERM, SIGUSR1 and SIGINT (Ctrl-C) ask the run to finish its step, save and end."""

import signal


class StopRequest:
    """Whether this process was asked to stop; the ranks agree on it after each step."""

    def __init__(self):
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.requested = True
