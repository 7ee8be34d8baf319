# Sourced by the scripts here: puts the environment that has infini_ds first on PATH. This is the
# activated one, or else .venv of the checkout; if neither has it, the script ends.
if ! python3 -c 'import sys
from importlib.util import find_spec
sys.exit(not (find_spec("infini_ds") and find_spec("deepspeed")))' 2>/dev/null; then
    environment=$(cd -- "$(dirname -- "$0")/.." && pwd)/.venv
    if [ ! -x "$environment/bin/infini-ds" ]; then
        echo "infini-ds: $(command -v python3 || echo python3) has no infini_ds, and there is none" \
            "in $environment; activate the environment that has it: source PATH/bin/activate" >&2
        exit 2
    fi
    PATH=$environment/bin:$PATH
fi
