#!/usr/bin/env bash
# Converts a Hugging Face Llama, Mistral, Qwen2 or Qwen3 to an export, to be trained further:
#
#   bash launch/convert_llama.sh SOURCE DESTINATION [options of `infini-ds convert from-llama`]
#
# SOURCE is a local directory or a name on the hub, such as Qwen/Qwen3-0.6B. To train it, set
# `init_from` in a run's config to DESTINATION.
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
. "$(dirname -- "$0")/environment.sh"
exec infini-ds convert from-llama "$@"
