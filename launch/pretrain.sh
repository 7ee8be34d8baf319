#!/usr/bin/env bash
"eval" 'case "$1" in --*) exec python3 -m infini_ds.cluster.supervisor "$0" "$@" ;; esac'
"exec" "deepspeed" "--log_level" "warning" "$0" "$@"
# This file is valid in two languages. A shell runs the lines above and becomes the DeepSpeed
# launcher, which runs the file once more in each process, with Python: there the lines above are
# strings, and what follows is the program. So all of these work:
#
#   bash launch/pretrain.sh CONFIG [key.path=value ...]
#   bash launch/pretrain.sh --max-restarts N [--hostfile HOSTS] CONFIG ...
#   deepspeed launch/pretrain.sh CONFIG ...
#   deepspeed --hostfile HOSTS launch/pretrain.sh CONFIG ...
#   torchrun --nproc-per-node N launch/pretrain.sh CONFIG ...
#
# With options first, a shell starts a supervisor around the launcher: see --help.

import sys

from infini_ds.cli import exit_code, main
from infini_ds.cluster.launcher import check_hostfile_of_launcher

if __name__ == "__main__":
    # DeepSpeed's launcher adds --local_rank=N, which is in the environment as well.
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    sys.exit(exit_code(check_hostfile_of_launcher) or main(["pretrain", *arguments]))
