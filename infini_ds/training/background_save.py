"""Writes checkpoints while training goes on (`train.async_save`).

Each rank copies what it holds into host memory and leaves the writing to a thread. Threads must not
communicate while the run does, so they meet on disk: each leaves a file with the checksums of what
it wrote, and that of rank 0 waits for all of them and writes the manifest, last as ever. At most
one checkpoint is being written at a time.
"""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infini_ds.config import RunConfig
from infini_ds.errors import RunError
from infini_ds.parallel.engine import Engine
from infini_ds.parallel.ranks import gathered, is_first_rank, own_rank, world_size
from infini_ds.runs import manifest
from infini_ds.runs.directory import RunDirectory
from infini_ds.runs.tokenizer import copy_kept_tokenizer
from infini_ds.system.causes import cause, one_line
from infini_ds.system.whole_file import whole_file
from infini_ds.training import checkpoint

_SECONDS_BETWEEN_LOOKS = 0.05


class BackgroundSave:
    """Saves an engine's checkpoints in the background.

    Args:
        on_saved: called with the directory, by rank 0's thread, when a checkpoint is valid.
    """

    def __init__(self, engine: Engine, config: RunConfig, on_saved: Callable[[Path], None]):
        self._engine, self._config, self._on_saved = engine, config, on_saved
        self._thread: threading.Thread | None = None
        self._directory = Path()
        self._failure = ""

    def start(self, state: dict[str, Any]) -> Path:
        """Begins the checkpoint of state["step"]; must be called on all ranks together.

        Raises:
            RunError: the one before could not be written.
        """
        self.finish()
        directory = RunDirectory(Path(self._config.output_dir)).checkpoint(state["step"]).path
        checkpoint.prepare(directory)
        write = self._engine.keep(directory, state["step"])
        own = checkpoint.texts(self._engine, self._config, state) if is_first_rank() else {}
        self._directory = directory
        arguments = (directory, own_rank(), world_size(), write, own)
        # It must not keep a process alive that has to end.
        self._thread = threading.Thread(target=self._run, args=arguments, daemon=True)
        self._thread.start()
        return directory

    def finish(self) -> None:
        """Waits for the checkpoint that is being written, if there is one; on all ranks together.

        Raises:
            RunError: a rank could not write its part, or was not done within train.timeout.
        """
        if self._thread is None:
            return
        limit = self._config.train.timeout
        end = time.monotonic() + limit
        while self._thread is not None:
            self._thread.join(_SECONDS_BETWEEN_LOOKS)
            writing = self._thread.is_alive()
            failure = self._failure
            if writing and not failure and time.monotonic() > end:
                failure = f"it was not done within train.timeout ({limit:g} s)"
            told = gathered((writing, failure))
            failures = [failure for _, failure in told if failure]
            if failures:
                raise RunError(
                    f"checkpoint {self._directory} could not be written ({failures[0]}); the older "
                    "ones are kept"
                )
            if not any(writing for writing, _ in told):
                self._thread = None

    def _run(
        self,
        directory: Path,
        rank: int,
        ranks: int,
        write: Callable[[], list[str]],
        own: dict[str, str],
    ) -> None:
        try:
            paths = [Path(path) for path in write()]
            if rank == 0:
                copy_kept_tokenizer(directory.parent.parent, directory)
                paths += (directory / "tokenizer").rglob("*")
            for name, text in own.items():
                (directory / name).write_text(text)
                paths.append(directory / name)
            files = {}
            for path in filter(Path.is_file, paths):
                files[str(path.relative_to(directory))] = manifest.entry(path)
            with whole_file(_part(directory, rank), "output_dir", RunError) as file:
                file.write_text(json.dumps(files))
            if rank == 0:
                self._complete(directory, ranks)
        except Exception as error:  # a thread has nobody to raise it to
            self._failure = cause(error) or one_line(error)

    def _complete(self, directory: Path, ranks: int) -> None:
        """Writes the manifest once every rank has left its part."""
        files, end = {}, time.monotonic() + self._config.train.timeout
        for rank in range(ranks):
            part = _part(directory, rank)
            while not part.exists():
                if time.monotonic() > end:
                    raise RunError(f"rank {rank} did not finish its part within train.timeout")
                time.sleep(_SECONDS_BETWEEN_LOOKS)
            files |= json.loads(part.read_text())
        for rank in range(ranks):
            _part(directory, rank).unlink()
        manifest.write(directory, dict(sorted(files.items())))
        checkpoint.delete_useless(directory, self._config.train.keep_last)
        self._on_saved(directory)


def _part(directory: Path, rank: int) -> Path:
    return directory / f"part_{rank:05d}.json"
