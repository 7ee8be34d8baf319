"""`infini-ds pretrain`: trains, alone or as one of the processes that a launcher starts."""

import argparse
import contextlib
import os
import sys

from infini_ds.commands.options import Commands, load_config, with_config
from infini_ds.errors import RunError, SharedError
from infini_ds.system import environment
from infini_ds.system.exit_code import fail


def add(commands: Commands) -> None:
    """Adds this command to the parser."""
    about = "train on this process; launch/pretrain.sh starts several"
    with_config(commands, "pretrain", about, _run).set_defaults(is_rank=True)


def _run(options: argparse.Namespace) -> None:
    config = load_config(options)
    world = environment.world_size()
    config.data_parallel_size(world)
    if world == 1:  # with several ranks, one must tell the others what it finds
        from infini_ds.data.opening import open_data

        open_data(config)
    from infini_ds.training.trainer import pretrain

    code = 0
    try:
        pretrain(config)
    except RunError as error:
        code = fail(error, 1)
    except SharedError as error:
        if world == 1:
            raise
        code = fail(error, 2) if os.environ["RANK"] == "0" else 2
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    # The process ends here without cleanup, for three reasons. After an error other ranks may be
    # gone, so the process group cannot be closed. Once in some hundred runs its threads abort a
    # process that closes it or exits with it open. And during an orderly exit, a scheduler's
    # SIGTERM (because another task has ended) would change the exit code.
    os._exit(code)
