"""The model stands alone: neither DeepSpeed nor process groups."""

import subprocess
import sys

CHECK = """
import sys, infini_ds.model.transformer, infini_ds.conversion.seed
print([name for name in sys.modules if name.split(".")[0] in ("deepspeed", "transformers")])
"""


def test_model_never_imports_deepspeed():
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
