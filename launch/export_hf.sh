#!/usr/bin/env bash
# Converts a run or an export to a directory that AutoModelForCausalLM of transformers loads:
#
#   bash launch/export_hf.sh SOURCE DESTINATION [options of `infini-ds convert to-hf`]
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
. "$(dirname -- "$0")/environment.sh"
exec infini-ds convert to-hf "$@"
