"""Signs of life of the ranks: which are lost, and which have ended and why.

They live in a key-value store on the host where the ranks met, separate from the traffic of
training. A frozen or disconnected rank stops giving signs; a rank that ends leaves a message.
"""

import json
import os
import socket
import threading
import time
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from infini_ds.errors import RunError
from infini_ds.guard.limited import within
from infini_ds.parallel.contact import WaitError
from infini_ds.system.causes import one_line

BEAT_SECONDS = 1.0
_SILENT_SECONDS = 3.5
"""Time between two looks at which ranks are alive: a few beats."""
_ANSWER_SECONDS = 5.0
"""Time limit for the store to answer."""
_LINGER_SECONDS = 20.0
"""Time for the others to read why the rank that hosts the store ends."""


class Peers:
    """The other ranks of a run as seen by this one; must be constructed on all ranks together."""

    def __init__(self):
        self.rank, self._world = dist.get_rank(), dist.get_world_size()
        self.alarm = ""
        """Says what happened to another rank once this is known; empty until then."""
        self._stopped = threading.Event()
        if self._world == 1:
            return
        self._beats = 0
        try:
            self._store = _open_store()
            self._beat()
            dist.barrier()
        except RuntimeError as error:
            raise RunError(f"the ranks lost each other at the start: {one_line(error)}") from None
        threading.Thread(target=self._keep_beating, name="peers", daemon=True).start()

    def stop(self) -> None:
        """Stops the signs of life, because this rank is done."""
        self._stopped.set()

    def leave_word(self, message: str, is_cause: bool) -> None:
        """Tells the other ranks that this one ends, and whether it is the cause of their ending."""
        if self._world == 1:
            return
        word = json.dumps({"message": message, "is_cause": is_cause})

        def tell() -> None:
            self._store.set(f"ended/{self.rank}", word)
            self._store.add("ended", 1)

        within(_ANSWER_SECONDS, tell, None)

    def linger(self) -> None:
        """Waits a few seconds, in the rank that hosts the store, until the others have ended."""
        if self._world > 1 and self.rank == 0:
            within(_LINGER_SECONDS, self._wait_for_others, None)

    def explain(self) -> str:
        """Says which ranks are lost, and which ended and why; "" if none. Takes a few seconds."""
        if self._world == 1:
            return ""
        gone = "rank 0, or the host where the ranks met, does not answer"
        return within(_SILENT_SECONDS + 2 * _ANSWER_SECONDS, self._look, gone)

    def _look(self) -> str:
        before = self._alive()
        time.sleep(_SILENT_SECONDS)
        after, ended = self._alive(), self._ended()
        parts = [
            f"rank {rank} on {after[rank]['host']} is lost"
            for rank in range(self._world)
            if rank not in (self.rank, *ended) and after[rank] == before[rank]
        ]
        parts += [
            f"rank {rank} on {after[rank]['host']} ended: {word['message']}"
            for rank, word in ended.items()
            if rank != self.rank and word["is_cause"]
        ]
        return "; ".join(parts)

    def _alive(self) -> list[dict]:
        names = [f"alive/{rank}" for rank in range(self._world)]
        return [json.loads(value) for value in self._store.multi_get(names)]

    def _ended(self) -> dict[int, dict]:
        return {
            rank: json.loads(self._store.get(f"ended/{rank}"))
            for rank in range(self._world)
            if self._store.check([f"ended/{rank}"])
        }

    def _wait_for_others(self) -> None:
        seen, since = self._alive(), time.monotonic()
        while True:
            alive, ended = self._alive(), self._ended()
            others = [rank for rank in range(self._world) if rank not in (self.rank, *ended)]
            if any(alive[rank] != seen[rank] for rank in others):
                seen, since = alive, time.monotonic()
            if not others or time.monotonic() - since > _SILENT_SECONDS:
                return
            time.sleep(BEAT_SECONDS / 4)

    def _beat(self) -> None:
        self._beats += 1
        value = {"host": socket.gethostname(), "beats": self._beats}
        self._store.set(f"alive/{self.rank}", json.dumps(value))

    def _keep_beating(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            try:
                self._beat()
                if self._store.check(["ended"]):
                    self.alarm = "another rank ended"
            except RuntimeError:
                self.alarm = "rank 0, or the host where the ranks met, is gone"
                return


def _open_store() -> Store:
    """Opens a separate connection, with a short time limit, to the store where the ranks met."""
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=_ANSWER_SECONDS),
    )
    # A launcher that restarts the ranks may keep the store.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"infini_ds/{attempt}", store)


def is_lost_contact(error: Exception) -> bool:
    """Returns whether an error means that another rank does not answer."""
    if isinstance(error, WaitError | dist.DistError):
        return True
    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
