"""The report of a finished run: quality beside the baseline, and commands to type next."""

import json
import shlex
from pathlib import Path

from rich.table import Table

from infini_ds.config import RunConfig
from infini_ds.errors import RunError
from infini_ds.evaluation.held_out import figure_name
from infini_ds.runs.directory import REPORT, RunDirectory
from infini_ds.system.console import Console
from infini_ds.system.whole_file import whole_file


def report(
    config: RunConfig,
    step: int,
    counts: dict[str, int],
    quality: dict[str, float],
    sample: str,
    console: Console,
) -> None:
    """Prints the report and writes its figures to report.json in the run's directory.

    Args:
        counts: how often things went wrong, by name: skipped_steps and rollbacks.
    """
    figures = {"step": step, **counts, **quality}
    if quality:
        table = Table(title=f"held-out documents after {step} steps")
        for column in ("", "bits per byte", "below unigram", "perplexity"):
            table.add_column(column, justify="left" if not column else "right")
        for name in dict.fromkeys(["", *config.data.corpora]):
            if figure_name("held_out", name, "loss") in quality:
                _add_corpus(table, quality, name)
        console.print(table)
    happened = [f"{count} {name.replace('_', ' ')}" for name, count in counts.items() if count]
    if happened:
        console.print(f"on the way: {', '.join(happened)}")
    if sample:
        console.rule("sample")
        console.print(sample)
        console.rule()
    output_dir = Path(config.output_dir)
    with whole_file(output_dir / REPORT, "output_dir", RunError) as file:
        file.write_text(json.dumps(figures, indent=1) + "\n")
    console.print(f"checkpoint   {RunDirectory(output_dir).checkpoint(step).path}")
    logs = shlex.quote(str(output_dir / "tensorboard"))
    console.print(f"TensorBoard  tensorboard --logdir {logs}")
    console.print(
        "go on        the same command resumes; to train longer add train.steps="
        f"{step + config.train.steps}"
    )


def _add_corpus(table: Table, quality: dict[str, float], corpus: str) -> None:
    """Adds rows for one corpus of a mixture, or for everything that is held out."""
    titles = ("tokenizer unigram baseline", "model, memory ablated", "model, with memory")
    if corpus:
        table.add_section()
        titles = (
            f"{corpus}: unigram baseline",
            f"{corpus}: memory ablated",
            f"{corpus}: with memory",
        )
    baseline = quality[figure_name("held_out_unigram", corpus, "bits_per_byte")]
    table.add_row(titles[0], f"{baseline:.4f}", "", "")
    for title, name in zip(titles[1:], ("held_out_without_memory", "held_out"), strict=True):
        bits = quality[figure_name(name, corpus, "bits_per_byte")]
        perplexity = quality[figure_name(name, corpus, "perplexity")]
        table.add_row(title, f"{bits:.4f}", f"{1 - bits / baseline:.1%}", f"{perplexity:.2f}")
