"""The model stands alone: neither DeepSpeed nor process groups."""

import subprocess
import sys

CHECK = """
import sys, infini_ds
assert "torch" not in sys.modules
import infini_ds.model.transformer, infini_ds.conversion.seed
infini_ds.load_model
print([name for name in sys.modules if name.split(".")[0] in ("deepspeed", "transformers")])
"""


def test_model_never_imports_deepspeed():
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
