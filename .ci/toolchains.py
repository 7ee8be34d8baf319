"""`make test-toolchains`: the Triton kernels under each supported pair of torch and Triton.

A toolchain is a folder of packages that are found before those of .venv, so that only what differs
is installed again. Logs, and what was compiled, stay beside the folders.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".venv-toolchains"
PYTHON = ROOT / ".venv/bin/python"
TOOLCHAINS = [
    [],  # the pinned one
    ["triton==3.9.0"],
    ["torch==2.11.0", "triton==3.6.0"],  # from PyPI for CUDA, 5 GB
]
TESTS = [
    "tests/kernels", "tests/model/test_absent_device.py", "tests/benchmarks/test_kernels.py",
    "tests/benchmarks/test_unfinished_products.py",
]  # fmt: skip


def main() -> int:
    """Prints pytest's last line of each toolchain, then a table; 1 if anything failed."""
    FOLDER.mkdir(exist_ok=True)
    failed = 0
    table = []
    for requirements in TOOLCHAINS:
        name = "-".join(requirements).replace("==", "-") or "pinned"
        packages = install(name, requirements) if requirements else None
        path = os.pathsep.join(map(str, filter(None, (packages, ROOT))))
        environment = {**os.environ, "PYTHONPATH": path}
        title = versions(environment)
        print(f"{title}: tests and compiles", flush=True)
        tests = [PYTHON, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", *TESTS]
        code, said = logged(FOLDER / f"{name}-tests.txt", tests, environment)
        failed |= code
        print(said[-1], flush=True)
        compiled = FOLDER / f"{name}-kernels.json"
        compiled.unlink(missing_ok=True)
        command = [PYTHON, "-m", "infini_ds.cli", "bench", "kernels", "--compile-only", "--json"]
        code, said = logged(FOLDER / f"{name}-kernels.txt", [*command, compiled], environment)
        failed |= code
        table += [f"{title}: {line}" for line in summary(compiled)] if compiled.exists() else said
    print("\n".join(table))
    return int(bool(failed))


def install(name: str, requirements: list[str]) -> Path:
    """The folder of a toolchain's packages, whole or not at all."""
    folder = FOLDER / name
    if not folder.exists():
        others = FOLDER / "constraints.txt"
        pinned = (ROOT / "constraints.txt").read_text().splitlines()
        others.write_text("\n".join(x for x in pinned if not x.startswith(("torch", "triton"))))
        part = FOLDER / f"{name}.part"
        command = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        command += ["--upgrade", "--target", part, "-c", others]
        subprocess.run([*command, *requirements], check=True)
        part.rename(folder)
    return folder


def versions(environment: dict[str, str]) -> str:
    code = "import torch, triton; print(f'torch {torch.__version__}, Triton {triton.__version__}')"
    return subprocess.check_output([PYTHON, "-c", code], env=environment, text=True).strip()


def logged(log: Path, command: list, environment: dict[str, str]) -> tuple[int, list[str]]:
    """The exit code of a command, and its lines, which the log has, too."""
    done = subprocess.run(
        command, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    log.write_text(done.stdout)
    if done.returncode:
        print(done.stdout[-4000:])
    return done.returncode, done.stdout.strip().splitlines()


def summary(compiled: Path) -> list[str]:
    """A line a target."""
    rows = json.loads(compiled.read_text())
    every = Counter(row["target"] for row in rows)
    broken = Counter(row["target"] for row in rows if row["broken"])
    stacks = {
        target: max(row.get("stack", 0) for row in rows if row["target"] == target)
        for target in every
    }
    ptxas = {row["target"]: row["ptxas"]["version"] for row in rows if "ptxas" in row}
    return [
        f"{target}: {count} kernels by ptxas {ptxas[target]}, of which {broken[target]} break a "
        f"rule; largest stack {stacks[target]} bytes"
        for target, count in every.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
