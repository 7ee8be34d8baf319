#!/usr/bin/env bash
# Fills .wheels/ with what a GPU machine without a package index lacks; see GPU.md in this folder.
# Run it where PyPI can be reached, then copy .wheels along with the checkout.
#
#   [PYTHON=python3] [FOR=3.12] bash launch/gpu_bundle.sh
#
# FOR is the Python version of that machine (x86-64), which must have torch, Triton and numpy.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} for=${FOR:-3.12}
most=$((60 * 1024 * 1024)) # bytes, with the checkout
missing=(
  annotated-types datasets dill hjson infini-transformer-pytorch multiprocess pydantic
  pydantic_core rotary-embedding-torch typing-inspection typing_extensions zstandard
)
ptxas=nvidia-cuda-nvcc==13.4.59 # as in Triton 3.9; 12.8, in 3.6 and 3.7, miscompiles for Hopper

fail() { echo "gpu_bundle.sh: $1" >&2; exit 1; }
# Takes the version from constraints.txt, so that both machines run the same.
pinned() { grep -i "^${1//[-_]/[-_]}==" constraints.txt || echo "$1"; }
download() {
  local platforms=() minor
  for minor in {39..17}; do platforms+=(--platform "manylinux_2_${minor}_x86_64"); done
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --python-version "$for" --implementation cp "${platforms[@]}" \
    --platform manylinux2014_x86_64 --platform manylinux1_x86_64 "$@"
}

rm -rf .wheels
mkdir .wheels
names=()
for name in "${missing[@]}"; do names+=("$(pinned "$name")"); done
download --dest .wheels "${names[@]}"

# PyPI has no wheel of DeepSpeed. Built without operators it is pure Python. Operators are compiled
# at their first use; on CUDA that happens only if parallel.offload_optimizer is set.
DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --disable-pip-version-check --no-deps \
  --wheel-dir .wheels "$(pinned deepspeed)"
compgen -G '.wheels/deepspeed-*-py3-none-any.whl' >/dev/null || fail "DeepSpeed's wheel is not pure"
for name in "${missing[@]}" deepspeed; do
  found=$(find .wheels -iname "${name//-/_}-*.whl" | wc -l)
  [ "$found" = 1 ] || fail "$found wheels of $name"
done

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
download --dest "$folder" "$ptxas"
"$python" - "$folder" <<'P'
import glob, lzma, sys, zipfile

(path,) = glob.glob(sys.argv[1] + "/*.whl")
with zipfile.ZipFile(path) as wheel, open(".wheels/ptxas.xz", "wb") as file:
    (name,) = (name for name in wheel.namelist() if name.endswith("/bin/ptxas"))
    file.write(lzma.compress(wheel.read(name), preset=4))
P

bytes=$(cat .wheels/* | wc -c)
tree=$(git ls-files -z --cached --others --exclude-standard | xargs -0 cat 2>/dev/null | wc -c)
ls -s --block-size=K .wheels
echo "$((bytes >> 20)) MiB in .wheels, $((tree >> 20)) MiB in the checkout"
[ $((bytes + tree)) -le "$most" ] || fail "more than $((most >> 20)) MiB"
