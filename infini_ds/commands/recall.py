"""`infini-ds bench recall`: measures how many pairs a memory holds, and for how long."""

import argparse

from infini_ds.commands.options import (
    MODEL,
    Commands,
    add_json,
    check_distinct,
    distinct,
    load_config,
    with_config,
    writable,
)
from infini_ds.errors import UserError
from infini_ds.system.arguments import Checked, at_least
from infini_ds.system.paths import argument

_PLOT = "recall.png"
_SEEDS, _TRAIN_PAIRS, _TRAIN_DISTANCES = [0, 1, 2], [4, 16, 64], [0]
_OF_TRAINING = ("rules", "seeds", "steps", "train_pairs", "train_distances", "save")


def add(names: Commands) -> None:
    """Adds this command to the benchmarks."""
    about = "how many pairs of keys and values a memory holds, and for how long"
    parser = with_config(names, "recall", about, _run, required=False)
    parser.add_argument(
        "--model", action=Checked, check=argument, metavar="MODEL", nargs="+", dest="models",
        help=f"ask trained models instead of training any: each is {MODEL}",
    )  # fmt: skip
    parser.add_argument(
        "--rules", action=Checked, check=_variants, metavar="NAMES",
        help="memory rules, and full-attention (all of them)",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", action=Checked, check=distinct(0),
        help=f"seeds for weights and documents ({_text(_SEEDS)})",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, help="steps of each run (the config's train.steps)")
    parser.add_argument(
        "--train-pairs", action=Checked, check=distinct(1), metavar="NUMBERS",
        help="pairs in a document of training: the next number follows once 0.9 of the answers are "
        f"right or its share of the steps is over ({_text(_TRAIN_PAIRS)})",
    )  # fmt: skip
    parser.add_argument(
        "--train-distances", action=Checked, check=distinct(0), metavar="NUMBERS",
        help="segments between pairs and questions, of which each step of training draws one "
        f"({_text(_TRAIN_DISTANCES)})",
    )  # fmt: skip
    parser.add_argument(
        "--save", action=Checked, check=argument, metavar="DIR",
        help="write every trained model into this directory as an export",
    )  # fmt: skip
    parser.add_argument(
        "--pairs", action=Checked, check=distinct(1), metavar="NUMBERS", default=[4, 16, 32, 64],
        help="pairs in a document that is asked (4,16,32,64)",
    )  # fmt: skip
    parser.add_argument(
        "--distances", action=Checked, check=distinct(0), metavar="NUMBERS",
        default=[0, 4, 16, 64, 256, 1024],
        help="segments between its pairs and questions (0,4,16,64,256,1024)",
    )  # fmt: skip
    parser.add_argument(
        "--documents", type=int, action=Checked, check=at_least(1), default=32,
        help="documents of each number of pairs and distance, beyond 64 segments a quarter (32)",
    )  # fmt: skip
    parser.add_argument(
        "--keys", type=int, action=Checked, check=at_least(1), default=96,
        help="different keys, and values; with 96 (default) all tokens are below 256",
    )  # fmt: skip
    add_json(parser)
    parser.add_argument(
        "--plot", action=Checked, check=writable, metavar="FILE",
        help=f"picture of accuracy by pairs and distance ({_PLOT})",
    )  # fmt: skip


def _run(options: argparse.Namespace) -> None:
    from infini_ds.benchmarks import recall
    from infini_ds.benchmarks.recall_variants import check_pairs, variants

    check_pairs("--pairs", options.pairs, options.keys)
    plot = options.plot or writable("--plot", _PLOT)
    asked = recall.Asked(options.pairs, options.distances, options.documents, options.keys)
    if options.models:
        _check_no_training(options)
        recall.run_models(options.models, asked, options.json, plot)
        return
    if options.config is None:
        raise UserError("CONFIG: name the config of what is to be trained, or trained --model")
    train_pairs = options.train_pairs or _TRAIN_PAIRS
    check_pairs("--train-pairs", train_pairs, options.keys)
    steps = [] if options.steps is None else [f"train.steps={options.steps}"]
    config = load_config(options, *steps)
    training = recall.Training(
        options.rules or variants(),
        options.seeds or _SEEDS,
        train_pairs,
        options.train_distances or _TRAIN_DISTANCES,
        options.save,
    )
    recall.run(config, training, asked, options.json, plot)


def _check_no_training(options: argparse.Namespace) -> None:
    check_distinct("--model", options.models)
    if options.config is not None or options.overrides:
        raise UserError("--model: nothing is trained; leave out CONFIG and its settings")
    for name in _OF_TRAINING:
        if getattr(options, name) is not None:
            option = name.replace("_", "-")
            raise UserError(f"--{option}: belongs to training; leave it out with --model")


def _variants(name: str, text: str) -> list[str]:
    from infini_ds.benchmarks.recall_variants import variants

    named, known = text.split(","), variants()
    for each in named:
        if each not in known:
            raise UserError(f"{name} ({each}) must be among {', '.join(known)}")
    check_distinct(name, named)
    return named


def _text(numbers: list[int]) -> str:
    return ",".join(map(str, numbers))
