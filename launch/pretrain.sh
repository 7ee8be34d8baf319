#!/usr/bin/env bash
"exec" "python3" "-m" "infini_ds.cluster.supervisor" "$0" "$@"
# This file is valid in two languages. A shell runs the line above and becomes a supervisor around
# DeepSpeed's launcher, which runs the file once more in each process, with Python: there that line
# is strings, and what follows is the program. So all of these work:
#
#   bash launch/pretrain.sh CONFIG [key.path=value ...]
#   bash launch/pretrain.sh --max-restarts N [--hostfile HOSTS] CONFIG ...
#   deepspeed launch/pretrain.sh CONFIG ...
#   deepspeed --hostfile HOSTS launch/pretrain.sh CONFIG ...
#   torchrun --nproc-per-node N launch/pretrain.sh CONFIG ...
#
# The first two hand Ctrl-C and SIGTERM on to the processes, and start a run again if they are told
# to: see --help.

import sys

from infini_ds.cli import exit_code, main
from infini_ds.cluster.launcher import check_hostfile_of_launcher

if __name__ == "__main__":
    # DeepSpeed's launcher adds --local_rank=N, which is in the environment as well.
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    sys.exit(exit_code(check_hostfile_of_launcher) or main(["pretrain", *arguments]))
