"""Simulates persons who move about and carry objects, and asks about them: facts of bAbI kind.

The tasks have the numbers of Weston et al. (2015), arXiv 1502.05698; sentences and words are made
here. Facts are told in the order in which they happen, and all questions refer to their end.

| task | question | answer |
|---|---|---|
| qa1 | Where is Mary? | the place to which she moved last (one supporting fact) |
| qa2 | Where is the apple? | where its holder is, or where it was put down (two) |
| qa3 | Where was the apple before the office? | the place before the latest time there (three) |
| qa8 | What is Mary carrying? | objects in the order in which she took them, or "nothing" |

With steps in its answers, qa2 first says who has the object: "Mary, kitchen" or "nobody, kitchen".
Each word then takes one fact to find.

Where a story is asked several questions, those about steps to the task's own come last: who has an
object ("nobody" once it was put down), what somebody carries, and where persons and objects are.
Only the answers that name objects teach a model to tell objects apart.
"""

from collections.abc import Callable
from itertools import permutations
from typing import NamedTuple

import numpy as np

from infini_ds.config import BabilongTask

PERSONS = ["Anna", "David", "John", "Laura", "Mary", "Peter"]
PLACES = ["cellar", "garden", "kitchen", "library", "office", "stable"]
OBJECTS = ["apple", "ball", "book", "key", "lamp", "milk"]
NOTHING, NOBODY = "nothing", "nobody"
_EMPTY_SHARE = 4  # one in so many questions of qa8 is about somebody who carries nothing
_CHANCE: dict[BabilongTask, float] = {
    "qa1": 1 / len(PLACES),
    "qa2": 1 / len(PLACES),
    "qa3": 1 / (len(PLACES) - 1),  # the question names another place
    "qa8": 1 / _EMPTY_SHARE,
}
_MOVES = ["went to", "moved to"]
_TAKES = ["picked up", "took"]
_DROPS = ["put down", "dropped"]
_MOST_PERSONS, _MOST_OBJECTS, _MOST_CARRIED = 4, 3, 3
_KINDS = {
    "qa1": ["move"],
    "qa2": ["move", "move", "take", "drop"],
    "qa3": ["move", "move", "move", "take", "take", "drop"],
    "qa8": ["move", "take", "take", "drop"],
}
"""The kinds of facts of each task; repeated ones are more frequent."""


class Asked(NamedTuple):
    """A question about a story."""

    question: str
    answer: str
    """One word, or objects with commas between them."""


class Story(NamedTuple):
    """What happens, and questions about it."""

    facts: list[str]
    """Sentences in the order of events."""
    asked: list[Asked]
    """At least one, each of them once: the task's own come before those that lead to them."""


class Draws:
    """Draws numbers from a random stream."""

    def __init__(self, random: np.random.Philox):
        self._random = random

    def below(self, end: int) -> int:
        """Draws an integer from 0 to end - 1."""
        return int(self._random.random_raw()) % end

    def share(self) -> float:
        """Draws a number in [0, 1)."""
        return int(self._random.random_raw()) / 2**64

    def one(self, choices: list):
        """Draws one of the choices."""
        return choices[self.below(len(choices))]

    def shuffled(self, choices: list) -> list:
        """Returns the choices in a random order."""
        order = np.argsort(self._random.random_raw(len(choices)), kind="stable")
        return [choices[index] for index in order]

    def some(self, choices: list, most: int) -> list:
        """Draws from 1 to `most` different choices."""
        return self.shuffled(choices)[: 1 + self.below(most)]


def tell(
    random: np.random.Philox,
    task: BabilongTask,
    facts: int,
    most_questions: int = 1,
    answer_steps: bool = False,
) -> Story:
    """Makes up a story.

    Args:
        facts: how many, at least `FEWEST_FACTS` of the task.
        most_questions: their number is drawn from 1 to this, fewer where there is less to ask.
        answer_steps: whether answers of qa2 begin with who has the object.
    """
    draws = Draws(random)
    asks_empty = draws.below(_EMPTY_SHARE) == 0
    while True:  # short stories often leave nothing to ask; the shortest of qa3 most often
        world = _World(draws, asks_empty, answer_steps)
        told = [world.go_on(draws.one(_KINDS[task])) for _ in range(facts)]
        questions = _QUESTIONS[task](world)
        if questions:
            steps = [asked for ask in _STEPS[task] for asked in ask(world)]
            return Story(told, _drawn(draws, questions, steps, most_questions))


def _drawn(draws: Draws, questions: list[Asked], steps: list[Asked], most: int) -> list[Asked]:
    """Draws from 1 to `most` of the questions, in any order, and then of the steps to them."""
    first = draws.one(questions)
    if most == 1:  # nothing else is drawn, so that such stories stay what they were
        return [first]
    others = draws.shuffled([asked for asked in questions if asked != first])
    return [first, *others, *draws.shuffled(steps)][: 1 + draws.below(most)]


def chance(task: BabilongTask, answer_steps: bool) -> float:
    """Returns the share of right answers that the best guess without the facts reaches."""
    holder = 1 / len(PERSONS) if answer_steps and task == "qa2" else 1
    return holder * _CHANCE[task]


def all_facts() -> list[str]:
    """Returns every sentence that a story may tell."""
    moves = [f"{who} {verb} the {where}." for who in PERSONS for verb in _MOVES for where in PLACES]
    verbs = [*_TAKES, *_DROPS]
    return moves + [f"{who} {verb} the {what}." for who in PERSONS for verb in verbs
                    for what in OBJECTS]  # fmt: skip


def all_questions() -> list[str]:
    """Returns every question that may be asked."""
    return [
        *map(_where_is, PERSONS),
        *(_where_is(f"the {what}") for what in OBJECTS),
        *(_where_was(what, where) for what in OBJECTS for where in PLACES),
        *map(_what_carries, PERSONS),
        *map(_who_has, OBJECTS),
    ]


def all_answers() -> list[str]:
    """Returns every answer that may be right."""
    counts = range(1, _MOST_CARRIED + 1)
    lists = [", ".join(held) for count in counts for held in permutations(OBJECTS, count)]
    holders = [*PERSONS, NOBODY]
    stepwise = [_stepwise(who, where) for who in holders for where in PLACES]
    return [*PLACES, *holders, NOTHING, *lists, *stepwise]


class _World:
    """A few persons and objects; nobody knows where they are until a fact tells it."""

    def __init__(self, draws: Draws, asks_empty: bool, answer_steps: bool):
        self.draws = draws
        self.answer_steps = answer_steps
        """As in `tell`."""
        self.asks_empty = asks_empty
        """Whether a question about what somebody carries is about somebody who carries nothing."""
        self._persons = draws.some(PERSONS, _MOST_PERSONS)
        self._objects = draws.some(OBJECTS, _MOST_OBJECTS)
        self.place: dict[str, str] = {}
        """The known places of persons."""
        self.held: dict[str, list[str]] = {}
        """For each person that a fact has named, the objects carried, first taken first."""
        self.path: dict[str, list[str]] = {}
        """For each object that has been taken, its known places, each unlike the one before."""

    def holder(self, what: str) -> str:
        """Returns who has an object, or "nobody"."""
        return next((who for who, held in self.held.items() if what in held), NOBODY)

    def go_on(self, kind: str) -> str:
        """Lets something happen and tells it: a person moves if the given kind is impossible."""
        who = self.draws.one(self._persons)
        held = self.held.setdefault(who, [])
        if kind == "take" and len(held) < _MOST_CARRIED:
            within_reach = [what for what in self._objects if self._can_take(who, what)]
            if within_reach:
                return self._take(who, self.draws.one(within_reach))
        if kind == "drop" and held and who in self.place:
            return self._drop(who, self.draws.one(held))
        return self._move(who)

    def _can_take(self, who: str, what: str) -> bool:
        """Whether no fact speaks against it: an object that nobody has touched may be anywhere."""
        if what not in self.path:
            return True
        lies_here = self.path[what][-1:] == [self.place.get(who)]
        return lies_here and self.holder(what) == NOBODY

    def _take(self, who: str, what: str) -> str:
        self.held[who].append(what)
        self.path.setdefault(what, [])
        if who in self.place:
            self._arrives(what, self.place[who])
        return f"{who} {self.draws.one(_TAKES)} the {what}."

    def _drop(self, who: str, what: str) -> str:
        self.held[who].remove(what)
        return f"{who} {self.draws.one(_DROPS)} the {what}."

    def _move(self, who: str) -> str:
        where = self.draws.one([place for place in PLACES if place != self.place.get(who)])
        self.place[who] = where
        for what in self.held[who]:
            self._arrives(what, where)
        return f"{who} {self.draws.one(_MOVES)} the {where}."

    def _arrives(self, what: str, where: str) -> None:
        if self.path[what][-1:] != [where]:
            self.path[what].append(where)


def _where_is(subject: str) -> str:
    return f"Where is {subject}?"


def _where_was(what: str, where: str) -> str:
    return f"Where was the {what} before the {where}?"


def _what_carries(who: str) -> str:
    return f"What is {who} carrying?"


def _who_has(what: str) -> str:
    return f"Who has the {what}?"


def _stepwise(holder: str, where: str) -> str:
    return f"{holder}, {where}"


def _ask_person(world: _World) -> list[Asked]:
    return [Asked(_where_is(who), where) for who, where in world.place.items()]


def _ask_object(world: _World) -> list[Asked]:
    return [
        Asked(
            _where_is(f"the {what}"),
            _stepwise(world.holder(what), path[-1]) if world.answer_steps else path[-1],
        )
        for what, path in world.path.items()
        if path
    ]


def _ask_holder(world: _World) -> list[Asked]:
    return [Asked(_who_has(what), world.holder(what)) for what in world.path]


def _ask_before(world: _World) -> list[Asked]:
    return [
        Asked(_where_was(what, path[i]), path[i - 1])
        for what, path in world.path.items()
        for i in range(1, len(path))
        if path[i] not in path[i + 1 :]
    ]


def _ask_list(world: _World) -> list[Asked]:
    return [
        Asked(_what_carries(who), ", ".join(held) or NOTHING)
        for who, held in world.held.items()
        if bool(held) != world.asks_empty
    ]


_QUESTIONS = {"qa1": _ask_person, "qa2": _ask_object, "qa3": _ask_before, "qa8": _ask_list}
_STEPS: dict[BabilongTask, list[Callable[[_World], list[Asked]]]] = {
    "qa1": [],
    "qa2": [_ask_holder, _ask_person, _ask_list],
    "qa3": [_ask_holder, _ask_person, _ask_list, _ask_object],
    "qa8": [_ask_holder],
}
"""Questions about single facts that a task's question combines."""
