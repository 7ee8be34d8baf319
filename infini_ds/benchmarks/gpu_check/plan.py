"""The steps of the check, the most valuable first."""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from infini_ds.benchmarks.gpu_check.results import Part, rows
from infini_ds.benchmarks.gpu_check.runs import Runs
from infini_ds.benchmarks.gpu_check.steps import Command, Running, Steps
from infini_ds.errors import RunError, UserError

SECONDS = 520.0
DRY_PATIENCE = 3.0
"""Factor on each step's limit in a dry run, because the CPU may be shared with others."""
CORRECT_CASES = 11
TILE_WORKERS = 4
COMPILED_AHEAD = (
    "linear:16:512:32:32:128:operation", "delta:16:512:32:32:128:operation",
    "gated_delta:16:512:32:32:128:operation", "linear:16:2048:32:32:128:operation",
    "delta:16:2048:32:32:128:operation", "gated_delta:16:2048:32:32:128:operation",
    "linear:16:2048:32:8:128:model", "delta:16:2048:16:8:128:model",
    "delta:16:2048:8:8:128:model", "linear:16:2048:8:8:128:model", "delta:2:512:4:2:128:model",
)  # fmt: skip
"""Cases that later steps start, compiled early so that none of them waits; see `compile_ahead`."""


class Check:
    """Checks one machine.

    Args:
        out: folder for results, summary and logs.
        work: folder for runs, caches and the like, whose contents are kept.
        tiny: whether to run tiny sizes on a CPU.
        ptxas: an assembler to try beside Triton's own, or None.
    """

    def __init__(
        self, out: Path, work: Path, tiny: bool, ptxas: str | None, seconds: float = SECONDS
    ) -> None:
        self._tiny, self._ptxas = tiny, ptxas
        self.steps = Steps(out, seconds, DRY_PATIENCE if tiny else 1.0)
        self._runs = Runs(work, self.steps.out / "logs", tiny)
        self._cores = len(os.sched_getaffinity(0))
        self._ahead: Running | None = None
        self.plan: dict[str, Callable[[], bool | None]] = {
            "env": self._env,
            "correct": self._correct,
            "bench": lambda: self._part("bench", 75),
            "sdpa": lambda: self._part("sdpa", 25),
            "run": lambda: self._run("run", 90, self._runs.first()),
            "resume": lambda: self._run("resume", 60, self._runs.resumed()),
            "two_stages": lambda: self._run("two_stages", 60, self._runs.two("two_stages")),
            "losses": self._losses,
            "models": lambda: self._part("models", 75),
            "sweep": lambda: self._part("sweep", 60),
            "tiles": self._tiles,
            "two_data": lambda: self._run("two_data", 50, self._runs.two("two_data")),
            "million": lambda: self._part("million", 60),
            "tests": self._tests,
            "sanitizer": self._sanitizer,
        }

    def run(self, names: Sequence[str]) -> None:
        """Runs the named steps, or all if there are no names; a failed step stops no others.

        Raises:
            UserError: there is no step of that name.
            RunError: a step failed.
        """
        for name in names:
            if name not in self.plan:
                raise UserError(f"gpu-check: no step {name}; there are {', '.join(self.plan)}")
        try:
            for name in names or self.plan:
                self.plan[name]()
        finally:
            if self._ahead:
                self._ahead.end()
        failed = [name for name, code in self.steps.codes.items() if code]
        if failed:
            raise RunError(f"gpu-check: {', '.join(failed)} failed; see {self.steps.out}/logs")

    def _part(self, name: str, limit: float, *commands: Command) -> bool:
        return self.steps.run(name, limit, commands or [part(name)])

    def _run(self, name: str, limit: float, commands: Sequence[Command]) -> bool:
        """Trains once nothing compiles in the background: ranks wait for each other."""
        if self._ahead:
            self._ahead.wait()
            self._ahead = None
        return self.steps.run(name, limit, commands, at_once=len(commands))

    def _env(self) -> None:
        self._part("env", 60)
        cases = COMPILED_AHEAD[:1] if self._tiny else COMPILED_AHEAD
        commands = [part("compile_ahead", case) for case in cases]
        at_once = 1 if self._tiny else len(cases)
        self._ahead = self.steps.start("compile_ahead", 120, commands, at_once)

    def _correct(self) -> None:
        """Tries each assembler; later steps use the newer one unless Triton's does better."""
        cases = range(2 if self._tiny else CORRECT_CASES)
        choices = [{}, {"TRITON_PTXAS_PATH": self._ptxas}] if self._ptxas else [{}]
        commands = [part("correct", str(case), **choice) for choice in choices for case in cases]
        at_once = len(commands) if self._cores > 12 else 2
        self.steps.run("correct", 120, commands, at_once)
        right = {"": 0, self._ptxas: 0}
        for row in rows(self.steps.results):
            if row["part"] == "correct" and row["verdict"] == "ok":
                right[row["ptxas"]] += 1
        own, newer = right[""], right.get(self._ptxas, 0)
        self.steps.say(
            f"correct: of {len(cases)} cases {own} right with Triton's own assembler"
            + (f", {newer} with {self._ptxas}" if self._ptxas else "")
        )
        if self._ptxas and 0 < newer >= own:
            os.environ["TRITON_PTXAS_PATH"] = self._ptxas
            self.steps.say(f"what follows is assembled by {self._ptxas}")
        if self._ahead:
            self._ahead.wait()
            self._ahead = None

    def _losses(self) -> None:
        name = "losses"
        self.steps.codes[name] = 0 if self._runs.losses_agree(self._note) else 1
        self.steps.say(f"{name:12} exit {self.steps.codes[name]:3d}")

    def _tiles(self) -> None:
        workers = 1 if self._tiny else TILE_WORKERS
        commands = [part("tiles_compile", str(i), str(workers)) for i in range(workers)]
        self.steps.run("tiles_compile", 60, commands, at_once=workers)
        self._part("tiles", 70)

    def _tests(self) -> None:
        """Runs the project's GPU tests: kernels in all layouts, and runs compared with a CPU's."""
        files = ["tests/kernels/test_triton.py", "tests/distributed/test_gpus.py"]
        options = ["-q", "-p", "no:cacheprovider", "-k", "gpu"]
        if self._tiny:
            options.append("--collect-only")
        command = Command([sys.executable, "-m", "pytest", *options, *files])
        self.steps.run("tests", 110, [command])

    def _sanitizer(self) -> None:
        tool = shutil.which("compute-sanitizer")
        if self._tiny or not tool:
            self.steps.say("sanitizer: not here" if not tool else "sanitizer: needs a GPU")
            return
        options = ["--tool", "memcheck", "--kernel-regex", "kns=_kernel", "--error-exitcode", "9"]
        arguments = [tool, *options, *part("correct", "1").arguments]
        self.steps.run("sanitizer", 60, [Command(arguments, {"REPEATS": "1"})])

    def _note(self, name: str, **figures) -> None:
        Part(self._tiny, self.steps.results, time.monotonic()).note(name, **figures)


def part(name: str, *arguments: str, **environment: str) -> Command:
    """Returns the command that runs a part of this package in its own process."""
    program = [sys.executable, "-m", "infini_ds.benchmarks.gpu_check", name, *arguments]
    return Command(program, environment)


def run(names: Sequence[str]) -> None:
    """Runs the check as the environment variables OUT, DRY, SECONDS_ALL and PTXAS ask.

    Raises:
        UserError, RunError: see `Check.run`.
    """
    out = Path(os.environ.get("OUT") or tempfile.mkdtemp(prefix="gpu_check_"))
    tiny = os.environ.get("DRY") == "1"
    seconds = float(os.environ.get("SECONDS_ALL", SECONDS))
    if tiny:
        os.environ["DS_ACCELERATOR"] = "cpu"
    with tempfile.TemporaryDirectory(prefix="gpu_check_work_") as work:
        check = Check(out, Path(work), tiny, os.environ.get("PTXAS"), seconds)
        try:
            check.run(names)
        finally:
            print(f"\n{(out / 'summary.txt').read_text()}\nresults, logs: {out}", flush=True)
