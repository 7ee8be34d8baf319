# pyright: reportMissingImports=false
"""Tasks of lm-evaluation-harness, with the memory on and ablated: `infini-ds evaluate --tasks`.

The harness makes the prompts and judges the answers; our own model reads them, in constant memory
and without a limit to their length.
"""

import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from torch import Tensor

from infini_ds.conversion.huggingface import add_tokenizer_code
from infini_ds.data.tokenizer_base import Tokenizer
from infini_ds.errors import UserError
from infini_ds.evaluation.harness_report import LENGTH, figures, table
from infini_ds.model.block import memory_ablated
from infini_ds.model.generation import Sampling, stream
from infini_ds.model.reading import call_width
from infini_ds.model.transformer import InfiniTransformer
from infini_ds.runs.checkpoint import Loaded
from infini_ds.runs.directory import TASKS
from infini_ds.runs.export import load_for_command
from infini_ds.system.causes import one_line, shortened
from infini_ds.system.compute_type import place
from infini_ds.system.console import Console
from infini_ds.system.figures import write_figures
from infini_ds.system.progress import ProgressLine, time_left

_NEW_TOKENS = 256
"""The longest answer of a task that does not say; as for models of transformers."""
_UNAVAILABLE = (ImportError, ConnectionError, FileNotFoundError)
"""What a task fails with whose data or libraries are not there."""
_TOKENS_BETWEEN_LOOKS = 16
"""An answer is searched for an end once in so many tokens."""


class HarnessOptions(NamedTuple):
    """Options of an evaluation."""

    tasks: list[str]
    task_folder: str | None
    """Folder with task files of one's own."""
    limit: int | None
    """The most examples of a task, or of each length where a task has several."""
    few_shot: int | None
    """Solved examples before each question; None leaves it to the task."""
    lengths: list[int]
    """Tokens of the prompts that RULER's tasks make."""
    batch: int
    """Number of examples that are read together."""


class Tasks(NamedTuple):
    """Tasks and groups of them, with the examples that they have made or read."""

    manager: TaskManager
    objects: list
    samples: dict[str, list[int]] | None
    """The examples to evaluate of each task; None for all of all."""


class Scored(NamedTuple):
    """A text whose last tokens are judged."""

    tokens: list[int]
    begin: int
    """The first token that is judged, at least 1."""


class HarnessModel(TemplateLM):
    """Our model as the harness asks for it.

    Args:
        on_done: called after each example with the number of those that were asked with it.
    """

    def __init__(
        self,
        model: InfiniTransformer,
        tokenizer: Tokenizer,
        batch: int,
        on_done: Callable[[int], None],
    ):
        super().__init__()
        self._model, self._codec, self._batch = model, tokenizer, batch
        self._on_done = on_done

    @property
    def eot_token_id(self) -> int:
        return self._codec.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._codec.bos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Encodes a text, with BOS before it as in training."""
        bos = [] if add_special_tokens is False else [self._codec.bos_id]
        return [*bos, *self._codec.encode(string)]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        texts = [Scored([*before, *after], len(before)) for _, before, after in requests]
        return self._scored(texts)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of each whole text after BOS."""
        texts = [Scored(self.tok_encode(request.args[0]), 1) for request in requests]
        return [likelihood for likelihood, _ in self._scored(texts)]

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Returns greedy or sampled answers, up to the first of the texts that end them."""
        answers = [""] * len(requests)
        for rows in self._batches([len(request.args[0]) for request in requests]):
            for settings, group in _alike(requests, rows):
                prompts = [self.tok_encode(requests[row].args[0]) for row in group]
                for row, answer in zip(group, self._answers(prompts, settings), strict=True):
                    answers[row] = answer
                    self._on_done(len(requests))
        return answers

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Yields rows that are read together, the longest first."""
        order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        for begin in range(0, len(order), self._batch):
            yield order[begin : begin + self._batch]

    @torch.no_grad()
    def _scored(self, texts: list[Scored]) -> list[tuple[float, bool]]:
        """Returns log-likelihoods, and whether greedy decoding would have written the tokens."""
        results = [(0.0, True)] * len(texts)
        for rows in self._batches([len(text.tokens) for text in texts]):
            read = self._read([texts[row] for row in rows])
            for row, hidden in zip(rows, read, strict=True):
                text = texts[row]
                wanted = torch.tensor(text.tokens[text.begin :], device=hidden.device)
                logits = self._model.logits(hidden).float()
                likelihood = logits.log_softmax(dim=-1).gather(1, wanted[:, None]).double().sum()
                greedy = bool((logits.argmax(dim=-1) == wanted).all())
                results[row] = float(likelihood), greedy
                self._on_done(len(texts))
        return results

    def _read(self, texts: list[Scored]) -> list[Tensor]:
        """Returns, for each text, the hidden states that predict its judged tokens."""
        tokens = self._filled([text.tokens[:-1] for text in texts])
        width = call_width(self._model.config.segment_length, len(texts))
        found: list[list[Tensor]] = [[] for _ in texts]
        memory, begin = None, 0
        for call in tokens.split(width, dim=1):
            hidden, memory = self._model.read(call, memory)
            for text, parts, row in zip(texts, found, hidden, strict=True):
                first = max(text.begin - 1 - begin, 0)
                parts.append(row[first : max(len(text.tokens) - 1 - begin, 0)])
            begin += call.shape[1]
        return [torch.cat(parts) for parts in found]

    def _filled(self, rows: list[list[int]]) -> Tensor:
        """Returns rows as a tensor; what fills up the shorter ones follows all that is used."""
        longest = max(map(len, rows))
        filled = [row + [0] * (longest - len(row)) for row in rows]
        return torch.tensor(filled, device=next(self._model.parameters()).device)

    def _answers(self, prompts: list[list[int]], settings: dict[str, Any]) -> list[str]:
        device = next(self._model.parameters()).device
        known: dict[str, Any] = {**normalize_gen_kwargs(settings, _NEW_TOKENS)}
        sampling = Sampling(
            known.get("temperature", 1.0), known.get("top_p", 1.0), known.get("top_k", 0)
        )
        ends = list(filter(None, known["until"]))
        columns = stream(
            self._model, [torch.tensor(prompt, device=device) for prompt in prompts],
            known["max_gen_toks"], sampling, self._codec.eos_id,
        )  # fmt: skip
        written: list[list[int]] = [[] for _ in prompts]
        for number, column in enumerate(columns, 1):
            for row, token in zip(written, column.tolist(), strict=True):
                row.append(token)
            look = number % _TOKENS_BETWEEN_LOOKS == 0
            if look and all(self._text(row, ends)[1] for row in written):
                break
        return [self._text(row, ends)[0] for row in written]

    def _text(self, tokens: list[int], ends: list[str]) -> tuple[str, bool]:
        """Returns a text up to its end, and whether it has one."""
        over = self._codec.eos_id in tokens
        if over:
            tokens = tokens[: tokens.index(self._codec.eos_id)]
        text = self._codec.decode(tokens)
        cut = min((place for end in ends if (place := text.find(end)) >= 0), default=len(text))
        return text[:cut], over or cut < len(text)


def run(path: str, step: int | None, options: HarnessOptions, json_path: str | None) -> None:
    """Evaluates a model on tasks and reports the results.

    Args:
        path, step: see `load_model`.
        json_path: where to write the figures as well, if anywhere.

    Raises:
        UserError: there is no such model or task, or a file cannot be written.
    """
    console = Console()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    loaded = load_for_command(path, step, console)
    place(loaded.model, console)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        tasks = _tasks(options, _described(loaded, Path(folder)))
        for name, ablated in (("with_memory", False), ("ablated", True)):
            with memory_ablated(loaded.model.blocks, ablated):
                shown = name.replace("_", " ")
                found[name] = _evaluated(loaded, tasks, options, shown, console)
    setup = {
        "checkpoint": str(loaded.checkpoint),
        "step": loaded.step,
        "segment_length": loaded.config.model.segment_length,
        "harness": version("lm_eval"),
        **options._asdict(),
    }
    result = figures(found, setup)
    console.print(table(result))
    write_figures(json_path, result)
    if loaded.run and loaded.checkpoint.parent.parent == loaded.directory:
        kept = str(loaded.directory / TASKS)
        write_figures(kept, result)
        console.print(f"{kept}: the same, for the model card")


def _described(loaded: Loaded, folder: Path) -> dict[str, Any]:
    """Returns what tasks that make their own prompts may ask of the model: where its tokenizer is,
    as transformers reads it."""
    loaded.tokenizer.save(folder)
    add_tokenizer_code(folder, loaded.tokenizer)
    return {"pretrained": str(folder)}


def _tasks(options: HarnessOptions, described: dict[str, Any]) -> Tasks:
    if options.task_folder and not Path(options.task_folder).is_dir():
        raise UserError(f"--task-folder {options.task_folder}: there is no such folder")
    metadata = {**described, "max_seq_lengths": options.lengths}
    manager = TaskManager(include_path=options.task_folder, metadata=metadata)
    for name in options.tasks:
        if not manager.match_tasks([name]):
            raise UserError(
                f"--tasks {name}: lm-evaluation-harness has no such task, group or tag; "
                "`lm_eval ls tasks` prints them, and --task-folder names a folder with your own"
            )
    try:
        found = manager.load(list(options.tasks))
    except _UNAVAILABLE as error:
        raise _unavailable(options, error) from None
    except ValueError as error:  # RULER's, for prompts that are too short for a needle
        reason = shortened(one_line(error)).replace("max_seq_length", "--lengths")
        raise UserError(f"--tasks {','.join(options.tasks)}: {reason}") from None
    inside = {child for children in found["group_map"].values() for child in children}
    objects = [
        each
        for kind in ("groups", "tasks")
        for name, each in found[kind].items()
        if name not in inside
    ]
    samples = None
    if options.limit:
        samples = {name: _first(task, options.limit) for name, task in found["tasks"].items()}
    return Tasks(manager, objects, samples)


def _first(task: Any, limit: int) -> list[int]:
    """Returns the first examples of a task, or the first of each of its lengths.

    RULER's tasks have all examples of the first length before those of the next.
    """
    taken: Counter = Counter()
    chosen = []
    for number, document in enumerate(task.eval_docs):
        length = document.get(LENGTH) if isinstance(document, dict) else None
        if taken[length] < limit:
            taken[length] += 1
            chosen.append(number)
    return chosen


def _unavailable(options: HarnessOptions, error: Exception) -> UserError:
    return UserError(f"--tasks {','.join(options.tasks)}: {one_line(error)}")


def _evaluated(
    loaded: Loaded, tasks: Tasks, options: HarnessOptions, name: str, console: Console
) -> dict[str, Any]:
    done = 0
    with ProgressLine(console, "evaluate", 1, *time_left()) as progress:

        def one_more(asked: int) -> None:
            nonlocal done
            done = done % asked + 1  # tasks of another kind are asked after these
            progress.show(done / asked, f"evaluate: {done:,} of {asked:,} requests {name}")

        model = HarnessModel(loaded.model, loaded.tokenizer, options.batch, one_more)
        try:
            return simple_evaluate(  # type: ignore[return-value]
                model=model, tasks=tasks.objects, num_fewshot=options.few_shot,
                samples=tasks.samples, task_manager=tasks.manager, bootstrap_iters=100,
            )  # fmt: skip
        except _UNAVAILABLE as error:
            raise _unavailable(options, error) from None


def _alike(requests: list, rows: list[int]) -> list[tuple[dict[str, Any], list[int]]]:
    """Returns groups of rows with equal settings of generation."""
    groups: list[tuple[dict[str, Any], list[int]]] = []
    for row in rows:
        settings = requests[row].args[1]
        for known, members in groups:
            if known == settings:
                members.append(row)
                break
        else:
            groups.append((settings, [row]))
    return groups
