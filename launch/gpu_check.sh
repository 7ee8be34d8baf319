#!/usr/bin/env bash
# Checks everything for a first day on a GPU in at most 520 s; see GPU.md in this folder.
#
#   [PYTHON=python3] [OUT=FOLDER] [DRY=1] bash launch/gpu_check.sh [STEP ...]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
work=${TMPDIR:-/tmp}/infini_ds_gpu_check_$UID # kept between calls, with compiled kernels
mkdir -p "$work"

# The bundle of `make gpu-bundle` provides what this Python lacks.
path=$PWD
if ! "$python" -c 'import deepspeed' 2>/dev/null; then
  compgen -G '.wheels/*.whl' >/dev/null || {
    echo "gpu_check.sh: $python has no DeepSpeed, and .wheels is empty: make gpu-bundle" >&2
    exit 2
  }
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$work/site" .wheels/*.whl
  path=$work/site:$path
fi
if [ -f .wheels/ptxas.xz ]; then
  export PTXAS=$work/ptxas
  "$python" -c 'import lzma, sys; sys.stdout.buffer.write(lzma.open(sys.argv[1]).read())' \
    .wheels/ptxas.xz >"$PTXAS"
  chmod +x "$PTXAS"
  "$PTXAS" --version >/dev/null || unset PTXAS
fi

export PYTHONPATH=$path${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 COLUMNS=160
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$work/triton}
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$work/extensions}
exec "$python" -m infini_ds.benchmarks.gpu_check "$@"
