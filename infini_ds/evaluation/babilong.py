"""BABILong: does a model combine facts that it read many segments ago, hidden in real text?

Documents of growing length hide facts of bAbI kind and ask about them at the end (`data.babilong`);
see `answers` for how the model reads and answers.
"""

from typing import NamedTuple

import numpy as np

from infini_ds.config import FEWEST_FACTS, BabilongConfig, BabilongTask, FillerKind
from infini_ds.data.babilong import Babilong, babilong_random
from infini_ds.data.passkey import TooShort
from infini_ds.data.store import stored_tokens
from infini_ds.data.tokenizer_base import Tokenizer
from infini_ds.errors import UserError
from infini_ds.evaluation import babilong_report as report
from infini_ds.evaluation import results as outcome
from infini_ds.evaluation.answers import (
    ask,
    batches,
    check_lengths,
    default_batch,
    default_samples,
)
from infini_ds.evaluation.babilong_report import Outcome
from infini_ds.evaluation.questions_progress import QuestionsProgress
from infini_ds.model.transformer import InfiniTransformer
from infini_ds.runs.export import load_for_command
from infini_ds.system.compute_type import place
from infini_ds.system.console import Console

# The streams of training documents begin with another number, see `babilong_random`.
_ASKED = 1


class BabilongOptions(NamedTuple):
    """Options of an evaluation; None stands for the default."""

    tasks: list[BabilongTask] | None
    """As data.babilong.tasks; by default, the value in the run's config."""
    segments: list[int]
    """Lengths of the documents in segments."""
    samples: int | None
    """Number of documents of each task and length; by default, fewer of the longer ones."""
    filler: FillerKind | None
    """As data.babilong.filler; by default, the value in the run's config."""
    batch: int | None
    """Number of documents that are read together."""
    seed: int
    """Seed of the documents."""


class Question(NamedTuple):
    """A document up to its answer."""

    prompt: np.ndarray
    """The tokens from BOS to the end of the question, equally many for each length."""
    before: int
    """Number of them before the last segment."""
    answer: str
    """The correct answer with the space before it and the full stop after it."""
    answer_tokens: int
    """Number of tokens of the answer, which ends in the last segment."""


class Questions:
    """Makes questions; each depends only on seed, task, length and number.

    Args:
        config: settings of the documents; segment_length is the model's, in tokens.
        seed: different seeds make different documents.

    Raises:
        UserError: text_files or the tokenizer are unusable.
    """

    def __init__(self, config: BabilongConfig, tokenizer: Tokenizer, seed: int):
        self._config, self._tokenizer, self._seed = config, tokenizer, seed
        self._babilong = Babilong(config, tokenizer)

    def make(self, task: BabilongTask, segments: int, number: int) -> Question:
        """Makes one of the questions of a task and length.

        Args:
            segments: length of the document with its answer, at least 2.

        Raises:
            UserError: the segments are too short for the facts or the question.
        """
        random = babilong_random(_ASKED, task, self._seed, segments, number)
        try:
            document = self._babilong.document(random, task, segments)
        except TooShort:  # its message names settings of training documents
            raise UserError(
                f"model.segment_length ({self._config.segment_length}): too short for the facts "
                f"or the question of {task} in {segments} segments; ask with longer --segments or "
                "other --tasks"
            ) from None
        tokenizer = self._tokenizer
        (asked,) = document.asked
        pieces = [
            tokenizer.encode_array(piece, index == 0)
            for index, piece in enumerate((*document.pieces, asked.question))
        ]
        bos = np.array([tokenizer.bos_id], np.uint32)
        prompt = stored_tokens([bos, *pieces], tokenizer.vocab_size)
        answer = tokenizer.encode_array(asked.answer, begins=False).tolist()
        before = (segments - 1) * self._config.segment_length
        return Question(prompt, before, tokenizer.decode(answer), len(answer))


def run(
    path: str, step: int | None, options: BabilongOptions, json_path: str | None, plot: str | None
) -> None:
    """Evaluates a model and reports the results.

    Args:
        path, step: see `load_model`.
        json_path: where to write the figures as well, if anywhere.
        plot: where to write the heat map; by default babilong.png in the run's directory, or in the
            working directory for an export.

    Raises:
        UserError: nothing can be measured with this run or these options, or a file cannot be
            written.
    """
    console = Console()
    loaded = load_for_command(path, step, console)
    places = outcome.places(loaded, "babilong", "babilong.png", json_path, plot)
    model, n = loaded.model, loaded.config.model.segment_length
    check_lengths(options.segments, n)
    trained = loaded.run.data.babilong if loaded.run else BabilongConfig()
    made = with_options(trained, options, n)
    questions = Questions(made, loaded.tokenizer, options.seed)
    place(model, console)
    plan: list[tuple[BabilongTask, int, int]] = [
        (task, segments, options.samples or default_samples(segments))
        for task in made.tasks
        for segments in dict.fromkeys(options.segments)
    ]
    batch = options.batch or default_batch(n)
    lengths = [(segments, samples) for _, segments, samples in plan]
    with QuestionsProgress(console, "babilong", lengths, n) as progress:
        outcomes = measure(model, loaded.tokenizer, questions, plan, batch, progress)
    setup = {
        "checkpoint": str(loaded.checkpoint),
        "step": loaded.step,
        "segment_length": n,
        "filler": made.filler,
        "facts": [made.min_facts, made.max_facts],
        "answer_steps": made.answer_steps,
        "seed": options.seed,
        "tokens_per_second": progress.tokens_per_second,
    }
    outcome.write(report.results(report.figures(outcomes, setup)), places, console)


def with_options(
    trained: BabilongConfig, options: BabilongOptions, segment_length: int
) -> BabilongConfig:
    """Returns the settings of the documents to ask about, with enough facts for every task, and one
    question each."""
    tasks = list(dict.fromkeys(options.tasks or trained.tasks))
    changes = {
        "segment_length": segment_length,
        "tasks": tasks,
        "filler": options.filler or trained.filler,
        "max_questions": 1,
        "max_facts": max(trained.max_facts, *(FEWEST_FACTS[task] for task in tasks)),
    }
    return trained.model_copy(update=changes)


def measure(
    model: InfiniTransformer,
    tokenizer: Tokenizer,
    questions: Questions,
    plan: list[tuple[BabilongTask, int, int]],
    batch: int,
    progress: QuestionsProgress,
) -> list[Outcome]:
    """Asks all questions and returns the outcomes.

    Args:
        plan: tasks, lengths in segments and numbers of documents of that task and length.
        batch: number of documents that are read together.

    Raises:
        UserError: the segments are too short for the facts or the question.
    """
    outcomes = []
    for task, segments, samples in plan:
        for numbers in batches(samples, batch):
            documents = [[questions.make(task, segments, number)] for number in numbers]
            for _, *rights in ask(model, tokenizer, documents, progress):
                outcomes.append(Outcome(task, segments, *rights))
    return outcomes
