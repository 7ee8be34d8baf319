"""Two ranks with a channel between them: python channel_worker.py MODE.

Rank 0 receives and writes what happened to RESULT as JSON.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from infini_ds.parallel.build import start_distributed
from infini_ds.parallel.contact import WaitError
from infini_ds.parallel.pipeline.channel import Channel

SIZES = [16, 48, 1, 1_000_000, 32, 5]
LIMIT = 2.0


def message_of(index: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(index)
    return torch.randint(256, (SIZES[index],), generator=generator, dtype=torch.uint8)


def receive(channel: Channel) -> dict:
    """What the receiver of `orderly` sees."""
    same = [torch.equal(channel.receive(size), message_of(i)) for i, size in enumerate(SIZES)]
    return {"same": same, "seconds": channel.seconds}


def wait_in_vain(call: Callable[[], object]) -> dict:
    """How a call that waits for another rank ends, and after how long."""
    begin = time.monotonic()
    try:
        call()
    except WaitError as error:
        return {"error": str(error), "waited": time.monotonic() - begin}
    return {"error": None}


def main() -> None:
    mode, result = sys.argv[1], Path(sys.argv[2])
    start_distributed(60)
    group = dist.new_group([0, 1])
    assert isinstance(group, dist.ProcessGroup)
    rank = dist.get_rank()
    channel = Channel("gradients of stage 1", 1 - rank, group, LIMIT)
    store = dist.distributed_c10d._get_default_store()
    if rank == 1:
        if mode == "orderly":
            for index in range(len(SIZES)):
                channel.send(message_of(index))
            channel.flush()
        elif mode == "dead":
            store.set("dying", "")
            os._exit(0)
        store.wait(["finished"])
        store.set("acknowledged", "")
    else:
        if mode == "dead":
            store.wait(["dying"])
        outcome = (
            receive(channel) if mode == "orderly" else wait_in_vain(lambda: channel.receive(16))
        )
        result.write_text(json.dumps(outcome))
        store.set("finished", "")
        if mode != "dead":
            store.wait(["acknowledged"])  # the store lives in this process
    # A group whose wait was given up cannot be closed in order.
    os._exit(0)


if __name__ == "__main__":
    main()
