"""Pass-key retrieval: does a model find digits that it read many segments ago?

Documents of growing length hide digits at some depth and ask for them at the end; see `answers` for
how the model reads and answers.
"""

from typing import Literal, NamedTuple

from infini_ds.config import PasskeyConfig
from infini_ds.data.passkey_wording import asked_keys
from infini_ds.data.tokenizer_base import Tokenizer
from infini_ds.errors import UserError
from infini_ds.evaluation import passkey_report as report
from infini_ds.evaluation import results as outcome
from infini_ds.evaluation.answers import (
    ask,
    batches,
    check_lengths,
    default_batch,
    default_samples,
)
from infini_ds.evaluation.passkey_questions import Questions
from infini_ds.evaluation.passkey_report import Outcome
from infini_ds.evaluation.questions_progress import QuestionsProgress
from infini_ds.model.transformer import InfiniTransformer
from infini_ds.runs.export import load_for_command
from infini_ds.system.compute_type import place
from infini_ds.system.console import Console


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
    """As data.passkey.queries; by default, the value in the run's config, and all for some."""
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
    check_lengths(options.segments, n)
    made = settings_of(loaded.run.data.passkey if loaded.run else PasskeyConfig(), n, options)
    questions = Questions(made, loaded.tokenizer, options.depths, options.seed)
    place(model, console)
    lengths = dict.fromkeys(options.segments)
    plan = [(segments, options.samples or default_samples(segments)) for segments in lengths]
    batch = options.batch or default_batch(n)
    with QuestionsProgress(console, "passkey", plan, n) as progress:
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
        "queries": options.queries or ("all" if passkey.queries == "some" else None),
        "values": options.values,
        "form": options.form,
    }
    made = passkey.model_copy(
        update={name: value for name, value in given.items() if value is not None}
    )
    if isinstance(made.queries, int) and made.queries > given["keys"]:
        raise UserError(
            f"--queries ({made.queries}) must be at most the keys of a document "
            f"({given['keys']}), or all"
        )
    return made


def measure(
    model: InfiniTransformer,
    tokenizer: Tokenizer,
    questions: Questions,
    plan: list[tuple[int, int]],
    batch: int,
    progress: QuestionsProgress,
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
        for numbers in batches(samples, batch):
            documents = [questions.make(segments, number, samples) for number in numbers]
            for question, *rights in ask(model, tokenizer, documents, progress):
                outcomes.append(Outcome(segments, question.depth, question.cut, *rights))
    return outcomes
