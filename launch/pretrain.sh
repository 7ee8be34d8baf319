#!/usr/bin/env bash
"exec" "deepspeed" "--log_level" "warning" "$0" "$@"
# This file is valid in two languages. A shell runs the line above and becomes the DeepSpeed
# launcher, which runs the file once more in each process, with Python: there the line above is a
# string, and what follows is the program. So all of these work:
#
#   bash launch/pretrain.sh CONFIG [key.path=value ...]
#   deepspeed launch/pretrain.sh CONFIG ...
#   deepspeed --hostfile HOSTS launch/pretrain.sh CONFIG ...
#   torchrun --nproc-per-node N launch/pretrain.sh CONFIG ...

import sys

from infini_ds.cli import main

if __name__ == "__main__":
    # DeepSpeed's launcher adds --local_rank=N, which is in the environment as well.
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    sys.exit(main(["pretrain", *arguments]))
