"""Three ranks that share windows: python context_worker.py MODE RESULT.

Rank 0 exchanges with the others and writes what happened to RESULT as JSON.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from infini_ds.parallel.build import start_distributed
from infini_ds.parallel.context import ContextGroup, open_context
from tests.parallel.channel_worker import LIMIT, wait_in_vain

WORLD = 3


def orderly(context: ContextGroup) -> dict:
    """What a rank gathers and sums up, and the bytes that it sends for it."""
    own = torch.arange(4.0) + 10 * context.place
    gathered = context.all_gather(own)()
    summed = context.sum_of_own(torch.arange(12.0).view(3, 4) * (1 + context.place))()
    bytes_sent = context.sent_bytes
    return {"gathered": gathered.tolist(), "summed": summed.tolist(), "bytes": bytes_sent}


def main() -> None:
    mode, result = sys.argv[1], Path(sys.argv[2])
    start_distributed(60)
    rank = dist.get_rank()
    context = open_context([[0, 1, 2]], WORLD, rank, LIMIT)
    assert context is not None
    store = dist.distributed_c10d._get_default_store()
    if rank == 0:
        if mode == "dead":
            store.wait(["dying"])
        if mode == "orderly":
            outcome = orderly(context)
        else:
            outcome = wait_in_vain(lambda: context.all_gather(torch.zeros(4))())
        result.write_text(json.dumps(outcome))
        store.set("finished", "")
    elif mode == "orderly":
        orderly(context)
    elif rank == 2 and mode == "dead":
        store.set("dying", "")
        os._exit(0)
    store.wait(["finished"])
    store.set(f"acknowledged {rank}", "")
    if rank == 0:  # the store lives in this process
        gone = {2} if mode == "dead" else set()
        store.wait([f"acknowledged {other}" for other in {1, 2} - gone])
    # A group whose wait was given up cannot be closed in order.
    os._exit(0)


if __name__ == "__main__":
    main()
