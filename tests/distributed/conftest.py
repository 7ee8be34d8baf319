"""A tiny corpus and runs on it, through launch/pretrain.sh."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from infini_ds.config import DataConfig, TokenizerConfig
from infini_ds.data.prepare import prepare
from tests import tiny
from tests.distributed.processes import Processes, start_ranks

SCRIPT = Path(__file__).parents[2] / "launch" / "pretrain.sh"
WORDS = ["def", "return", "memory", "of", "all", "segments", "(x)", "\n    ", "= 1", "épsilon"]


class Run:
    """A run's config, and what is in its output directory."""

    def __init__(self, folder: Path, data: DataConfig, **settings):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.config = folder / "run.yaml"
        self._launches = 0
        own = {
            "output_dir": str(folder / "output"),
            "model": {
                "hidden_size": 32, "head_dim": 16, "segment_length": 16, "memory_rule": "delta",
                "initializer_range": 0.1,
                "memory": {"write_gate": True, "write_penalty": 0.1, "short_conv": True},
            },
            "data": data.model_dump(),
            "train": {
                "steps": 16, "batch_size": 4, "micro_batch_size": 2, "window_segments": 2,
                "chunks": 2, "save_every": 5, "keep_last": 9, "timeout": 40.0, "threads": 1,
                "dtype": "bf16",
            },
            "optimizer": {
                "learning_rate": 1e-2, "warmup_steps": 3, "write_penalty_warmup_steps": 8,
            },
            "evaluation": {"every": 0, "max_segments": 8, "sample_tokens": 0},
        }  # fmt: skip
        tree = tiny.run_tree(**(own | settings))
        self.output = Path(tree["output_dir"])
        self.config.write_text(yaml.safe_dump(tree))

    def script(self, *overrides: str) -> list[str]:
        """What each rank runs, and its arguments."""
        return [str(SCRIPT), str(self.config), *overrides]

    def start(self, world: int, *overrides: str, directories=None) -> Processes:
        """Starts the ranks."""
        self._launches += 1
        logs = self.folder / f"launch{self._launches}"
        return start_ranks(self.script(*overrides), world, logs, directories=directories)

    def finish(self, world: int, *overrides: str) -> str:
        """Runs all ranks to their end; the output of rank 0."""
        with self.start(world, *overrides) as ranks:
            assert ranks.wait(120, together=True) == [0] * world, ranks.outputs()
            return ranks.all[0].output

    @property
    def metrics(self) -> dict[int, dict]:
        """Lines of metrics.jsonl that are of a training step, by step."""
        path = self.output / "metrics.jsonl"
        if not path.exists():
            return {}
        lines = path.read_text().splitlines(keepends=True)
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        return {record["step"]: record for record in records if "train/loss" in record}

    @property
    def losses(self) -> dict[int, float]:
        return {step: record["train/loss"] for step, record in self.metrics.items()}

    def checkpoint(self, step: int) -> Path:
        return self.output / "checkpoints" / f"step_{step:08d}"

    @property
    def unfinished_save(self) -> Path | None:
        """A checkpoint that is being written."""
        for directory in (self.output / "checkpoints").glob("step_*"):
            if not (directory / "manifest.json").exists():
                return directory
        return None

    def checksums(self, step: int) -> dict[str, str]:
        """Of a checkpoint's weights, optimizer states and memories."""
        manifest = json.loads((self.checkpoint(step) / "manifest.json").read_text())
        other = ("config.yaml", "state.json")
        return {k: v["sha256"] for k, v in manifest["files"].items() if k not in other}


def assert_equal_states(run: Run, other: Run, step: int) -> None:
    """Compares what the files of a checkpoint hold; written in the background, their bytes may
    differ, where DeepSpeed's own point to one object twice."""
    names = run.checksums(step)
    assert names.keys() == other.checksums(step).keys()
    for name in names:
        one, two = (each.checkpoint(step) / name for each in (run, other))
        if one.suffix == ".pt":
            states = [torch.load(path, weights_only=False) for path in (one, two)]
            torch.testing.assert_close(*map(_comparable, states), rtol=0, atol=0)
        else:
            assert one.read_bytes() == two.read_bytes(), name


def _comparable(state):
    """Nested states as one dict, with what is no tensor as text."""
    flat, waiting = {}, [("", state)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(f"{path}/{key}", inner) for key, inner in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(f"{path}/{place}", inner) for place, inner in enumerate(value)]
        else:
            flat[path] = (
                value
                if isinstance(value, torch.Tensor)
                else torch.tensor(list(str(value).encode()))
            )
    return flat


def copied(run: Run, folder: Path, data, **settings) -> Run:
    """A run whose output directory begins as that of another one."""
    copy = Run(folder, data, **settings)
    shutil.copytree(run.output, copy.output)
    return copy


def without_checkpoints_after(run: Run, step: int) -> Run:
    for directory in (run.output / "checkpoints").glob("step_*"):
        if int(directory.name.rpartition("_")[2]) > step:
            shutil.rmtree(directory)
    return run


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> DataConfig:
    """A store of a few hundred short documents."""
    folder = tmp_path_factory.mktemp("corpus")
    corpus = folder / "corpus.jsonl"
    draw = random.Random(0)
    with corpus.open("w") as file:
        for number in range(300):
            text = " ".join(draw.choices(WORDS, k=draw.randint(1, 60)))
            file.write(json.dumps({"text": f"{number} {text}"}) + "\n")
    config = DataConfig(
        source="files",
        files=[str(corpus)],
        store=str(folder / "store"),
        held_out_fraction=0.1,
        tokenizer=TokenizerConfig(kind="bytes"),
    )
    prepare(config, workers=1)
    return config
