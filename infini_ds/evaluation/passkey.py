"""Pass-key retrieval: does a model find digits that it read many segments ago?

Documents of growing length hide digits at some depth and ask for them at the end. The model reads
them window by window with a memory of constant size and then generates the answer greedily; only
the whole answer counts as right. Where a document asks for several, each answer is generated and
counted on its own, after the right answers to the questions before it. With its memory ablated, the
model sees nothing but the segments of the questions, which gives the level of guessing.
"""

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Literal, NamedTuple

import numpy as np
import torch

from infini_ds.config import PasskeyConfig
from infini_ds.data.passkey_wording import asked_keys
from infini_ds.data.tokenizer_base import Tokenizer
from infini_ds.errors import UserError
from infini_ds.evaluation import passkey_report as report
from infini_ds.evaluation import results as outcome
from infini_ds.evaluation.passkey_progress import PasskeyProgress
from infini_ds.evaluation.passkey_questions import Question, Questions
from infini_ds.evaluation.passkey_report import Outcome
from infini_ds.model.reading import CALL_TOKENS, call_width, read_text
from infini_ds.model.transformer import InfiniTransformer
from infini_ds.runs.export import load_for_command
from infini_ds.system.compute_type import place
from infini_ds.system.console import Console

_BATCH = 8
_LONGEST_TOKENS = 1 << 30


class PasskeyOptions(NamedTuple):
    """Options of an evaluation; None stands for the default."""

    segments: list[int]
    """Lengths of the documents in segments."""
    depths: int
    """Number of equal parts of the text before the last segment, over which keys are spread."""
    samples: int | None
    """Number of documents of each length; by default, fewer of the longer ones."""
    filler: str | None
    """As data.passkey.filler; by default, the value in the run's config."""
    keys: int | None
    """As data.passkey.keys; by default, the (largest) value in the run's config."""
    queries: int | Literal["all"] | None
    """As data.passkey.queries; by default, the value in the run's config."""
    values: int | None
    """As data.passkey.values; by default, the value in the run's config."""
    form: str | None
    """As data.passkey.form; by default, the value in the run's config."""
    batch: int | None
    """Number of documents that are read together."""
    seed: int
    """Seed of the documents."""


def run(
    path: str, step: int | None, options: PasskeyOptions, json_path: str | None, plot: str | None
) -> None:
    """Evaluates a model and reports the results.

    Args:
        path, step: see `load_model`.
        json_path: where to write the figures as well, if anywhere.
        plot: where to write the heat map; by default passkey.png in the run's directory, or in the
            working directory for an export.

    Raises:
        UserError: nothing can be measured with this run or these options, or a file cannot be
            written.
    """
    console = Console()
    loaded = load_for_command(path, step, console)
    places = outcome.places(loaded, "passkey", "passkey.png", json_path, plot)
    model, n = loaded.model, loaded.config.model.segment_length
    if max(options.segments) * n > _LONGEST_TOKENS:
        raise UserError(
            f"--segments ({max(options.segments):,}): must be at most {_LONGEST_TOKENS // n:,} of "
            f"this model's, which have {n:,} tokens"
        )
    made = settings_of(loaded.run.data.passkey if loaded.run else PasskeyConfig(), n, options)
    questions = Questions(made, loaded.tokenizer, options.depths, options.seed)
    place(model, console)
    lengths = dict.fromkeys(options.segments)
    plan = [(segments, options.samples or default_samples(segments)) for segments in lengths]
    batch = options.batch or max(1, min(_BATCH, CALL_TOKENS // n))
    with PasskeyProgress(console, plan, n) as progress:
        outcomes = measure(model, loaded.tokenizer, questions, plan, batch, progress)
    setup = {
        "checkpoint": str(loaded.checkpoint),
        "step": loaded.step,
        "segment_length": n,
        "depths": options.depths,
        "filler": made.filler,
        "keys": made.keys,
        "queries": asked_keys(made, made.key_counts[-1]),
        "values": made.values,
        "form": made.form,
        "task": made.task,
        "digits": made.digits,
        "seed": options.seed,
        "tokens_per_second": progress.tokens_per_second,
    }
    figures = report.figures(outcomes, options.depths, setup)
    outcome.write(report.results(figures), places, console)


def settings_of(passkey: PasskeyConfig, n: int, options: PasskeyOptions) -> PasskeyConfig:
    """Returns the settings of the documents: the options, and the run's own where none is given.

    Raises:
        UserError: more keys are asked for than there are.
    """
    given = {
        "segment_length": n,
        "filler": options.filler,
        "keys": options.keys or passkey.key_counts[-1],
        "queries": options.queries,
        "values": options.values,
        "form": options.form,
    }
    made = passkey.model_copy(
        update={name: value for name, value in given.items() if value is not None}
    )
    if made.queries != "all" and made.queries > given["keys"]:
        raise UserError(
            f"--queries ({made.queries}) must be at most the keys of a document "
            f"({given['keys']}), or all"
        )
    return made


def default_samples(segments: int) -> int:
    """Returns the number of documents of a length: 64, and above 512 segments fewer, at least 8."""
    return max(8, min(64, 32768 // segments))


def measure(
    model: InfiniTransformer,
    tokenizer: Tokenizer,
    questions: Questions,
    plan: list[tuple[int, int]],
    batch: int,
    progress: PasskeyProgress,
) -> list[Outcome]:
    """Asks all questions and returns the outcomes.

    Args:
        plan: pairs of a length in segments and the number of documents of that length.
        batch: number of documents that are read together.

    Raises:
        UserError: the segments are too short for the keys or the questions.
    """
    outcomes = []
    for segments, samples in plan:
        for begin in range(0, samples, batch):
            numbers = range(begin, min(begin + batch, samples))
            documents = [questions.make(segments, number, samples) for number in numbers]
            # Those that are read together must be alike; by bytes, all are.
            for _, alike in groupby(sorted(documents, key=_sizes), key=_sizes):
                outcomes += _outcomes(model, tokenizer, segments, list(alike), progress.read)
            progress.answered(len(documents))
    return outcomes


def _sizes(document: list[Question]) -> list[int]:
    return [document[0].before, *(len(question.prompt) for question in document)]


def _outcomes(
    model: InfiniTransformer,
    tokenizer: Tokenizer,
    segments: int,
    documents: list[list[Question]],
    on_read: Callable[[int], None],
) -> Iterator[Outcome]:
    """Yields the outcomes of documents whose questions have equal places."""
    right, ablated = (
        _answers_right(model, tokenizer, documents, memory, on_read) for memory in (True, False)
    )
    for asked in zip(documents, right, ablated, strict=True):
        for question, *rights in zip(*asked, strict=True):
            yield Outcome(segments, question.depth, question.cut, *rights)


def _answers_right(
    model: InfiniTransformer,
    tokenizer: Tokenizer,
    documents: list[list[Question]],
    memory: bool,
    on_read: Callable[[int], None],
) -> list[list[bool]]:
    """Returns for each question of each document whether its answer is right."""
    n, before = model.config.segment_length, documents[0][0].before
    state = None
    if memory:
        read = np.stack([document[0].prompt[:before] for document in documents])
        _, state = read_text(
            model, [torch.from_numpy(read)], None, call_width(n, len(documents)), on_read
        )
    device = next(model.parameters()).device
    right: list[list[bool]] = [[] for _ in documents]
    for asked in zip(*documents, strict=True):
        prompts = np.stack([question.prompt[before:] for question in asked])
        written = model.generate(
            torch.from_numpy(prompts.astype(np.int64)).to(device),
            max_new_tokens=max(question.answer_tokens for question in asked),
            temperature=0.0,
            memory=state,
        )
        for row, question, of_document in zip(written.tolist(), asked, right, strict=True):
            text = tokenizer.decode(row[: question.answer_tokens])
            of_document.append(text == question.answer)
    return right
