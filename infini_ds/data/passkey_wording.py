"""Words the statements and the questions of pass-key documents.

| form | a key is stated as | and asked for as |
|---|---|---|
| `sentence` | ` The pass key of Adam is 71432. Remember it. 71432 is the pass key of Adam. ` | \
` What is the pass key of Adam? The pass key of Adam is 71432` |
| `adjacent` | ` Adam=71432. ` | ` Adam=71432` |
| `variables` | ` VAR Adam = 71432. `, ` VAR Dana = VAR Adam. ` | \
` Which variables are 71432? They are Adam, Dana` |

A key of several values is stated once for each, and the question asks for all of them in that
order: ` Adam=71432, 20435`. The sentences of an only key name nobody. In the form `variables` a key
is a number, and its values are the variables that have it.
"""

from typing import NamedTuple

import numpy as np

from infini_ds.config import PasskeyConfig

# All names have one length, so that documents of as many segments and keys have equal room.
NAMES = [
    "Adam", "Alan", "Alex", "Anna", "Bert", "Carl", "Cora", "Dana", "Dean", "Dora", "Earl",
    "Edna", "Emil", "Emma", "Eric", "Erin", "Fred", "Gary", "Gina", "Greg", "Hans", "Hope",
    "Hugo", "Ivan", "Jack", "Jane", "John", "Jose", "Judy", "June", "Karl", "Kate", "Kurt",
    "Lars", "Lena", "Lisa", "Luis", "Lynn", "Mark", "Mary", "Mike", "Nina", "Noah", "Nora",
    "Olga", "Omar", "Otto", "Owen", "Paul", "Pete", "Rita", "Rosa", "Ross", "Ruth", "Ryan",
    "Sara", "Sean", "Stan", "Tina", "Toby", "Todd", "Vera", "Will", "Zach",
]  # fmt: skip


class Asked(NamedTuple):
    """One of the answers that a document asks for."""

    question: bytes
    """The text that leads to the answer, from the end of the one before or of the filler."""
    answer: bytes
    """The digits or the name that is right."""


class Wording(NamedTuple):
    """The texts of a document without its filler, key by key, in the order of asking."""

    statements: list[list[bytes]]
    """The statements of each key, one for each of its values."""
    questions: list[list[Asked]]
    """For each key that is asked for, its values in the order of their statements."""


def names_needed(config: PasskeyConfig, keys: int) -> int:
    """Returns the number of names in a document of so many keys."""
    return keys * config.values if config.form == "variables" else keys


def worded(config: PasskeyConfig, keys: int, random: np.random.Philox) -> Wording:
    """Draws the numbers and the names of a document and words them."""
    values, variables = config.values, config.form == "variables"
    numbers = [_digits(random, config.digits) for _ in range(keys if variables else keys * values)]
    names = [""]
    if keys > 1 or config.form != "sentence":
        chosen = np.argsort(random.random_raw(len(NAMES)), kind="stable")
        names = [NAMES[name] for name in chosen[: names_needed(config, keys)]]
    statements, questions = [], []
    for key in range(keys):
        own = slice(key * values, (key + 1) * values)
        if variables:
            stated, question, answers = _variables(numbers[key], names[own])
        elif config.form == "adjacent":
            answers = numbers[own]
            stated = [f" {names[key]}={number}. " for number in answers]
            question = f" {names[key]}="
        else:
            answers = numbers[own]
            stated, question = _sentences(names[key], answers)
        statements.append([statement.encode() for statement in stated])
        leads = [question, *[", "] * (values - 1)]
        questions.append(
            [Asked(*(text.encode() for text in pair)) for pair in zip(leads, answers, strict=True)]
        )
    asked = asked_keys(config, keys)
    if config.queries == "some":
        asked = 1 + int(random.random_raw()) % keys
    return Wording(statements, questions[:asked])


def asked_keys(config: PasskeyConfig, keys: int) -> int:
    """Returns how many of so many keys are asked for, at most."""
    return config.queries if isinstance(config.queries, int) else keys


def _sentences(name: str, numbers: list[str]) -> tuple[list[str], str]:
    of = f" of {name}" if name else ""
    the, one, many = f"The pass key{of}", f"A pass key{of}", f"The pass keys{of}"
    if len(numbers) == 1:
        stated = f" {the} is {numbers[0]}. Remember it. {numbers[0]} is the pass key{of}. "
        return [stated], f" What is the pass key{of}? {the} is "
    stated = [f" {one} is {n}. Remember it. {n} is a pass key{of}. " for n in numbers]
    return stated, f" What are the pass keys{of}? {many} are "


def _variables(number: str, names: list[str]) -> tuple[list[str], str, list[str]]:
    sources = [number, *(f"VAR {name}" for name in names)]
    stated = [f" VAR {name} = {source}. " for name, source in zip(names, sources, strict=False)]
    return stated, f" Which variables are {number}? They are ", names


def _digits(random: np.random.Philox, digits: int) -> str:
    return "".join(str(int(raw) % 10) for raw in np.atleast_1d(random.random_raw(digits)))
