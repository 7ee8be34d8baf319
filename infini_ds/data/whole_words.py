"""Cuts text at the spaces between its words.

Every part that is cut out begins with white space or at the beginning of the text, and ends with a
whole word.
"""

from itertools import pairwise

_SPACES = " \n\t"


def from_a_word(text: str) -> str:
    """Returns the text from its first white space on, without a word that may be half of one."""
    begins = [index for space in _SPACES if (index := text.find(space)) >= 0]
    return text[min(begins) :] if begins else ""


def cut_to_words(text: str, size: int, places: list[float]) -> list[str]:
    """Cuts about the first `size` characters into one part more than there are places.

    Args:
        places: growing numbers from 0 to 1, where in these characters to cut.

    Returns:
        The parts, of at most `size` characters together; some may be empty.
    """
    cuts = [_word_end(text, min(int(place * (size + 1)), size)) for place in places]
    bounds = [0, *cuts, _word_end(text, size)]
    return [text[begin:end] for begin, end in pairwise(bounds)]


def drop_a_word(parts: list[str]) -> None:
    """Removes the last word of the shortest part that has any."""
    index = min((i for i, part in enumerate(parts) if part), key=lambda i: len(parts[i]))
    part = parts[index]
    parts[index] = part[: _word_end(part, len(part) - 1)]


def _word_end(text: str, most: int) -> int:
    """Returns the largest index up to `most` at which white space follows; 0 if there is none."""
    return max(0, *(text.rfind(space, 0, most + 1) for space in _SPACES))
