#!/usr/bin/env bash
''':'
. "$(dirname -- "$0")/environment.sh"
exec python3 -m infini_ds.cluster.supervisor "$0" "$@"
'''
# This file is valid in two languages. A shell runs the lines above and becomes a supervisor around
# DeepSpeed's launcher. The launcher runs the file again with Python in each process; there the
# lines above are a string, and the program follows. So all of these work:
#
#   bash launch/pretrain.sh CONFIG [key.path=value ...]
#   bash launch/pretrain.sh --max-restarts N [--hostfile HOSTS] CONFIG ...
#   deepspeed launch/pretrain.sh CONFIG ...
#   deepspeed --hostfile HOSTS launch/pretrain.sh CONFIG ...
#   torchrun --nproc-per-node N launch/pretrain.sh CONFIG ...
#
# The first two forward Ctrl-C and SIGTERM to the processes and can restart a failed run; see
# --help.

import sys

try:
    from infini_ds.cli import main
    from infini_ds.cluster.launcher import check_hostfile_of_launcher, unquoted
    from infini_ds.system.environment import use_utf8
    from infini_ds.system.exit_code import exit_code
except ModuleNotFoundError as missing:
    print(
        f"infini-ds: {sys.executable}, which was told to run {__file__}, has no {missing.name}; "
        "activate the environment that has it (source .venv/bin/activate) before",
        file=sys.stderr,
    )
    sys.exit(2)

if __name__ == "__main__":
    use_utf8()
    # DeepSpeed's launcher adds --local_rank=N, which is in the environment as well.
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    sys.exit(exit_code(check_hostfile_of_launcher) or main(["pretrain", *unquoted(arguments)]))
