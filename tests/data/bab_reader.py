"""Reads facts of bAbI kind back from text and answers questions about them, slowly and literally.

It shares nothing with the simulator: nothing is kept up to date, and each question is answered by
looking through all sentences again.
"""

import re
from typing import NamedTuple

FACT = re.compile(
    r"\b([A-Z][a-z]+) (went to|moved to|picked up|took|put down|dropped) the ([a-z]+)\."
)
ACTS = {
    "went to": "move", "moved to": "move", "picked up": "take", "took": "take",
    "put down": "drop", "dropped": "drop",
}  # fmt: skip


class Fact(NamedTuple):
    who: str
    act: str
    what: str
    """The place or the object."""


def facts_in(text: str) -> list[Fact]:
    return [Fact(who, ACTS[verb], what) for who, verb, what in FACT.findall(text)]


def place_of_person(facts: list[Fact], who: str) -> str | None:
    return next((f.what for f in reversed(facts) if f.who == who and f.act == "move"), None)


def last_touch(facts: list[Fact], what: str) -> int | None:
    touched = [i for i, f in enumerate(facts) if f.act != "move" and f.what == what]
    return touched[-1] if touched else None


def place_of_object(facts: list[Fact], what: str) -> str | None:
    touch = last_touch(facts, what)
    if touch is None:
        return None
    seen = facts if facts[touch].act == "take" else facts[:touch]
    return place_of_person(seen, facts[touch].who)


def carried(facts: list[Fact], who: str) -> list[str]:
    """What somebody carries, first taken first."""
    takes = [
        i for i, f in enumerate(facts)
        if f.act == "take" and f.who == who and last_touch(facts, f.what) == i
    ]  # fmt: skip
    return [facts[i].what for i in takes]


def places_in_turn(facts: list[Fact], what: str) -> list[str]:
    """The known places of an object, each unlike the one before."""
    places: list[str] = []
    for end in range(1, len(facts) + 1):
        place = place_of_object(facts[:end], what)
        if place and places[-1:] != [place]:
            places.append(place)
    return places


def holder_of(facts: list[Fact], what: str) -> str:
    touch = last_touch(facts, what)
    assert touch is not None, what
    return facts[touch].who if facts[touch].act == "take" else "nobody"


def answer_to(facts: list[Fact], question: str, steps: bool = False) -> str:
    """Answers a question.

    Args:
        steps: whether to say who has an object before where it is.
    """
    if asked := re.fullmatch(r"Where is the (\w+)\?", question):
        place = str(place_of_object(facts, asked[1]))
        return f"{holder_of(facts, asked[1])}, {place}" if steps else place
    if asked := re.fullmatch(r"Where is (\w+)\?", question):
        return str(place_of_person(facts, asked[1]))
    if asked := re.fullmatch(r"Where was the (\w+) before the (\w+)\?", question):
        places = places_in_turn(facts, asked[1])
        return places[max(i for i, place in enumerate(places) if place == asked[2]) - 1]
    if asked := re.fullmatch(r"Who has the (\w+)\?", question):
        return holder_of(facts, asked[1])
    asked = re.fullmatch(r"What is (\w+) carrying\?", question)
    assert asked, question
    return ", ".join(carried(facts, asked[1])) or "nothing"


def contradictions(facts: list[Fact]) -> list[str]:
    """Facts that cannot follow from those before them."""
    wrong = []
    for i, fact in enumerate(facts):
        before, here = facts[:i], place_of_person(facts[:i], fact.who)
        if fact.act == "move" and fact.what == here:
            wrong.append(f"{fact}: is there already")
        if fact.act == "drop" and fact.what not in carried(before, fact.who):
            wrong.append(f"{fact}: does not carry it")
        touch = last_touch(before, fact.what)
        if fact.act == "take" and touch is not None:
            if facts[touch].act == "take":
                wrong.append(f"{fact}: somebody carries it")
            elif place_of_object(before, fact.what) != here:
                wrong.append(f"{fact}: is not where it lies")
    return wrong
