"""Makes training runs through DeepSpeed: one rank, its resumption, and two ranks on one GPU."""

import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

from infini_ds.benchmarks.gpu_check.steps import Command

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "launch" / "pretrain.sh"
STEPS, MORE_STEPS, STEPS_OF_TWO = 12, 16, 6
APART = 0.02
"""Largest relative difference allowed between losses of two stages and of one, in bf16."""
MODEL = {
    "hidden_size": 512, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 128,
    "segment_length": 512,
}  # fmt: skip
TINY_MODEL = {
    "hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16,
    "segment_length": 32,
}  # fmt: skip
ON_ONE_GPU = {
    "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
    "NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo", "NCCL_DEBUG": "WARN",
    "NCCL_MAX_CTAS": "4", "NCCL_NVLS_ENABLE": "0",
}  # fmt: skip
"""NCCL refuses two ranks on one GPU unless they claim to be on two hosts (NCCL_HOSTID); they then
communicate through the loopback interface."""


class Runs:
    """Training runs that share a folder.

    Args:
        work: folder for their store, checkpoints and figures.
        logs: folder for the logs of single ranks.
        tiny: whether to run a small model on a CPU.
    """

    def __init__(self, work: Path, logs: Path, tiny: bool) -> None:
        self._work, self._logs, self._tiny = work, logs, tiny
        self._config = work / "run.yaml"
        self._config.write_text(yaml.safe_dump(self._tree()))

    def first(self) -> list[Command]:
        """Returns commands that make the store and train through DeepSpeed's launcher."""
        program = (
            "import subprocess, sys\n"
            "for command in map(eval, sys.argv[1:]):\n"
            "    subprocess.run(command, check=True)\n"
        )
        prepare = [sys.executable, "-m", "infini_ds.cli", "prepare", str(self._config)]
        arguments = map(repr, (prepare, self._launch()))
        return [Command([sys.executable, "-c", program, *arguments])]

    def resumed(self) -> list[Command]:
        """Returns the command that resumes from the first run's checkpoint."""
        return [Command(self._launch(f"train.steps={MORE_STEPS}"))]

    def two(self, name: str) -> list[Command]:
        """Returns commands for two ranks on one device: as stages, or sharing lanes (two_data)."""
        layout = {
            "two_stages": ["parallel.pipeline_stages=2"],
            "two_data": ["parallel.pipeline_stages=1", "parallel.zero_stage=1"],
        }[name]
        port = _free_port()
        overrides = [f"output_dir={self._work / name}", f"train.steps={STEPS_OF_TWO}", *layout]
        arguments = [sys.executable, str(SCRIPT), str(self._config), *overrides]
        return [
            Command(
                arguments,
                {**ON_ONE_GPU, "RANK": rank, "NCCL_HOSTID": f"host{rank}", "MASTER_PORT": port},
            )
            for rank in ("0", "1")
        ]

    def losses_agree(self, note: Callable[..., None]) -> bool:
        """Notes whether two stages had one rank's losses, and the resumed run reached its end."""
        one, two = self._losses("run"), self._losses("two_stages")
        shared = sorted(one.keys() & two.keys())
        apart = max((abs(one[i] - two[i]) / one[i] for i in shared), default=None)
        note("pipeline", losses_apart=apart, one=one, two=two)
        ended = max(one, default=0) == MORE_STEPS and len(shared) == STEPS_OF_TWO
        return ended and apart is not None and apart <= APART

    def _losses(self, name: str) -> dict[int, float]:
        path = self._work / name / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        figures = map(json.loads, lines)
        return {each["step"]: each["train/loss"] for each in figures if "train/loss" in each}

    def _launch(self, *overrides: str) -> list[str]:
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "warning"]
        ranks = ["--num_accelerators", "1", "--master_port", _free_port()]
        return [*launcher, *ranks, str(SCRIPT), str(self._config), *overrides]

    def _tree(self) -> dict:
        memory = {"write_gate": True, "short_conv": True, "write_penalty": 0.01}
        model = TINY_MODEL if self._tiny else MODEL
        return {
            "output_dir": str(self._work / "run"),
            "model": {**model, "memory_rule": "delta", "memory": memory},
            "data": {
                "source": "python-stdlib", "store": str(self._work / "store"),
                "max_documents": 40 if self._tiny else 200, "tokenizer": {"kind": "bytes"},
            },
            "train": {
                "steps": STEPS, "batch_size": 4, "micro_batch_size": 2, "window_segments": 4,
                "chunks": 2, "dtype": "bf16", "save_every": 6, "log_every": 1, "timeout": 200.0,
                "threads": 1 if self._tiny else 0,
            },
            "optimizer": {
                "learning_rate": 1e-3, "warmup_steps": 2, "schedule": "wsd", "decay_steps": 1,
            },
            "kernels": {"backend": "auto" if self._tiny else "triton"},
            "evaluation": {
                "every": 0, "max_segments": 16, "sample_tokens": 16, "sample_prompt": "def ",
            },
        }  # fmt: skip


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
