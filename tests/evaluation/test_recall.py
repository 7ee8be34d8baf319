"""Recall is measured as it can be counted by hand, from readers that know all or nothing."""

import pytest
import torch

from infini_ds.data.recall import FILLER, vocabulary
from infini_ds.evaluation.recall import (
    Questions,
    measure,
    measure_whole,
    tokens_to_read,
    with_segment_length,
)
from infini_ds.model.transformer import InfiniTransformer
from tests import tiny

KEYS, SEGMENT = 10, 8


class Perfect:
    """A reader whose memory is a table of all pairs, and that answers from it.

    Args:
        forgets_after: number of tokens after which it knows nothing; by default never.
    """

    training = False
    config = tiny.model_config(vocab_size=vocabulary(KEYS), segment_length=SEGMENT)

    def __init__(self, forgets_after: int = 10**9):
        self.forgets_after = forgets_after
        self.longest_call = 0

    def parameters(self):
        return iter([torch.zeros(1)])

    def train(self, mode: bool = True):
        return self

    def read(self, tokens, memory):
        """Hidden states are the token that follows, as far as it is known."""
        self.longest_call = max(self.longest_call, tokens.shape[1])
        known, seen = memory or ([{} for _ in tokens], 0)
        hidden = torch.zeros(*tokens.shape, 1)
        after = []
        for row, (text, table) in enumerate(zip(tokens.tolist(), known, strict=True)):
            table = dict(table)
            for place, token in enumerate(text):
                if FILLER <= token < FILLER + KEYS:
                    lost = seen > self.forgets_after
                    hidden[row, place] = 0 if lost else table.get(token, 0)
                    if place + 1 < len(text):
                        table.setdefault(token, text[place + 1])
            after.append(table)
        return hidden, (after, seen + tokens.shape[1])

    def logits(self, hidden):
        return torch.nn.functional.one_hot(hidden[..., 0].long(), vocabulary(KEYS)).float()


def test_reader_that_knows_all_pairs_answers_all_and_without_memory_none():
    questions = Questions([1, 10], [70, 0, 3], 40, KEYS, SEGMENT)
    reader = Perfect()
    found = measure(reader, questions, lambda tokens: None)
    assert found["cells"] == [
        {"pairs": pairs, "distance": distance, "right": pairs * documents,
         "answers": pairs * documents, "accuracy": 1.0}
        for pairs in (1, 10) for distance, documents in ((70, 8), (0, 40), (3, 40))
    ]  # fmt: skip
    assert found["ablated"] == [
        {"pairs": pairs, "right": 0, "answers": 40 * pairs, "accuracy": 0.0} for pairs in (1, 10)
    ]
    assert reader.longest_call <= 16 * SEGMENT


def test_accuracy_is_that_of_each_distance():
    # Three segments state the pairs, so 12 come before the questions at a distance of 9.
    questions = Questions([2], [0, 2, 9, 10], 3, KEYS, SEGMENT)
    reader = Perfect(forgets_after=(3 + 9) * SEGMENT)
    cells = measure(reader, questions, lambda tokens: None)["cells"]
    assert [cell["accuracy"] for cell in cells] == [1.0, 1.0, 1.0, 0.0]


class Guess(Perfect):
    """A reader that always gives the same value."""

    def read(self, tokens, memory):
        return torch.full((*tokens.shape, 1), FILLER + KEYS), None


def test_guessing_gives_chance():
    questions = Questions([10], [0], 200, KEYS, SEGMENT)
    found = measure(Guess(), questions, lambda tokens: None)
    (cell,), (ablated,) = found["cells"], found["ablated"]
    assert cell["answers"] == 2000
    assert cell["accuracy"] == ablated["accuracy"] == pytest.approx(1 / KEYS, abs=0.03)


@pytest.fixture(scope="module")
def model() -> InfiniTransformer:
    return InfiniTransformer(Perfect.config).eval()


def test_all_tokens_are_reported(model):
    questions = Questions([1, 10], [0, 70, 3], 40, KEYS, SEGMENT)
    read = []
    measure(model, questions, read.append)
    assert sum(read) == tokens_to_read(questions, whole=False)
    read = []
    measure_whole(model, questions, read.append)
    assert sum(read) == tokens_to_read(questions, whole=True)


def test_whole_documents_are_read_as_far_as_they_fit(model):
    questions = Questions([1, 10], [0, 507, 508, 509], 1, KEYS, SEGMENT)
    cells = measure_whole(model, questions, lambda tokens: None)["cells"]
    # 4,096 tokens are 512 segments: 3 state one pair and 1 asks for it; 8 state ten and 3 ask.
    assert [(cell["pairs"], cell["distance"]) for cell in cells] == [
        (1, 0), (1, 507), (1, 508), (10, 0)
    ]  # fmt: skip


def test_longer_segments_change_nothing_else(model):
    tokens = torch.randint(0, vocabulary(KEYS), (2, SEGMENT))
    longer = with_segment_length(model, 3 * SEGMENT)
    assert longer.config.segment_length == 3 * SEGMENT
    assert torch.allclose(longer(tokens).logits, model(tokens).logits, atol=1e-6)
