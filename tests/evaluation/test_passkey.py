"""The counting is right, and reading needs no more memory for longer documents."""

import json
import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from infini_ds import cli
from infini_ds.config import PasskeyConfig
from infini_ds.data.sentencepiece_tokenizer import SentencePieceTokenizer, train_sentencepiece
from infini_ds.data.tokenizer_base import ByteTokenizer
from infini_ds.errors import UserError
from infini_ds.evaluation.answers import default_samples
from infini_ds.evaluation.passkey import Outcome, PasskeyOptions, measure, settings_of
from infini_ds.evaluation.passkey_questions import Questions
from infini_ds.evaluation.passkey_report import figures
from infini_ds.memory import RULES
from infini_ds.model.reading import CALL_TOKENS, call_width, read_text
from infini_ds.model.transformer import InfiniTransformer
from tests import tiny
from tests.evaluation.oracle import Oracle, Progress

torch.set_num_threads(1)

N = 64
DEPTHS = 4


def questions(tokenizer=None, n=N, **changes) -> Questions:
    config = PasskeyConfig(segment_length=n, **changes)
    return Questions(config, tokenizer or ByteTokenizer(), DEPTHS, seed=0)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> SentencePieceTokenizer:
    """A tokenizer with pieces of several characters."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    text = "The grass is green. The sky is blue. What is the pass key? Remember it. 71 20 435"
    train_sentencepiece(iter([text, text.lower()] * 20), 320, path)
    return SentencePieceTokenizer(path.read_bytes(), "made here")


class KeyOracle(Oracle):
    """Finds the key in the text, if it looks."""

    def __init__(self, tokenizer, looks: bool):
        super().__init__(tokenizer, N)
        self.looks = looks

    def answer(self, row: list[int], reads: bool) -> list[int]:
        text = self.tokenizer.decode(row)
        assert not reads or row[0] == self.tokenizer.bos_id
        (asked,) = re.findall(r"What is the (pass key[^?]*)\? The \1 is $", text)
        found = re.findall(rf"The {asked} is (\d+)\. Remember", text)
        return self.tokenizer.encode(found[0] if self.looks and found else "00000")


def outcomes_of(model, asked, plan, batch=3) -> list[Outcome]:
    return measure(model, model.tokenizer, asked, plan, batch, Progress())


class TestCounting:
    @pytest.mark.parametrize("filler", ["standard", "noise"])
    @pytest.mark.parametrize("keys", [1, 3])
    @pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
    def test_oracle_finds_every_key_but_only_with_its_memory(self, pieces, kind, keys, filler):
        tokenizer = pieces if kind == "sentencepiece" else ByteTokenizer()
        asked = questions(tokenizer, filler=filler, keys=keys)
        outcomes = outcomes_of(KeyOracle(tokenizer, looks=True), asked, [(6, 10), (9, 4)])
        assert Counter(outcome.segments for outcome in outcomes) == {6: 10, 9: 4}
        assert all(outcome.right for outcome in outcomes)
        assert not any(outcome.right_ablated for outcome in outcomes)

    def test_model_that_does_not_look_finds_none(self):
        outcomes = outcomes_of(KeyOracle(ByteTokenizer(), looks=False), questions(), [(5, 10)])
        assert not any(outcome.right or outcome.right_ablated for outcome in outcomes)

    def test_figures_count_each_kind_apart(self):
        outcomes = [
            Outcome(16, 0, cut=False, right=True, right_ablated=False),
            Outcome(16, 0, cut=True, right=False, right_ablated=False),
            Outcome(16, 2, cut=False, right=True, right_ablated=True),
            Outcome(16, 2, cut=False, right=False, right_ablated=False),
            Outcome(64, 1, cut=False, right=True, right_ablated=False),
        ]
        first, second = figures(outcomes, 3, {"step": 7})["lengths"]
        assert first == {
            "segments": 16, "samples": 4, "all": 0.5, "whole": 2 / 3, "cut": 0.0, "ablated": 0.25,
            "by_depth": [0.5, None, 0.5], "samples_by_depth": [2, 0, 2],
        }  # fmt: skip
        assert (second["segments"], second["all"], second["cut"]) == (64, 1.0, None)


class ManyOracle(KeyOracle):
    """Finds the answer to any question of any form, or only those to the first of a document."""

    first_only = False

    def generate(self, prompt, max_new_tokens, temperature, memory):
        assert temperature == 0
        rows = prompt if memory is None else torch.cat((memory, prompt), dim=1)
        n = self.config.segment_length
        assert rows.shape[1] // n == (rows.shape[1] + max_new_tokens - 1) // n
        return torch.tensor([self._answer(row, memory, max_new_tokens) for row in rows.tolist()])

    def _answer(self, row, memory, size):
        before = 0 if memory is None else memory.shape[1]
        text, asked = (self.tokenizer.decode(part) for part in (row[:before], row[before:]))
        earlier = re.findall(r"[ .](?:=|(?:is|are) |[Tt]hey are )\d", asked)
        question, given = re.findall(r"(?: |=)(\w+)(?:=|\?[^?]*(?:is|are) )((?:\w+, )*)$", asked)[0]
        values = dict(re.findall(r" VAR (\w+) = (?:VAR )?(\w+)\. ", text))
        if "variables" in asked:
            found = [name for name in values if root(values, name) == question]
        else:
            sentences = re.findall(rf"pass keys?(?: of {question})? is (\d+)\. Remember", text)
            found = sentences or re.findall(rf" {question}=(\d+)\. ", text)
        nth = given.count(",")
        looks = self.looks and not (self.first_only and (earlier or nth))
        ids = self.tokenizer.encode(found[nth] if looks and found else "00000")
        return (ids + [0] * size)[:size]


def root(values, name):
    while name in values:
        name = values[name]
    return name


MANY = {
    "sentence": {"keys": 3, "queries": "all"},
    "sentence_values": {"keys": 2, "values": 2, "queries": 2},
    "adjacent": {"keys": 4, "queries": "all", "form": "adjacent"},
    "adjacent_some": {"keys": 9, "queries": 7, "form": "adjacent", "filler": "noise"},
    "adjacent_values": {"keys": 3, "values": 2, "queries": 2, "form": "adjacent"},
    "variables": {"keys": 2, "values": 3, "queries": 2, "form": "variables"},
}
ANSWERS = {name: {"sentence_values": 4, "adjacent_values": 4, "variables": 6}.get(name, count)
           for name, count in zip(MANY, (3, 0, 4, 7, 0, 0), strict=True)}  # fmt: skip


class TestManyAnswers:
    @pytest.mark.parametrize("name", MANY)
    @pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
    def test_oracle_finds_each_but_only_with_its_memory(self, pieces, kind, name):
        tokenizer = pieces if kind == "sentencepiece" else ByteTokenizer()
        asked = questions(tokenizer, n=128, **MANY[name])
        model = ManyOracle(tokenizer, looks=True)
        model.config.segment_length = 128
        outcomes = outcomes_of(model, asked, [(9, 6), (14, 2)])
        count = ANSWERS[name]
        assert Counter(outcome.segments for outcome in outcomes) == {9: 6 * count, 14: 2 * count}
        assert all(outcome.right for outcome in outcomes)
        assert not any(outcome.right_ablated for outcome in outcomes)
        assert {outcome.depth for outcome in outcomes} == set(range(DEPTHS))

    @pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
    def test_each_answer_counts_by_itself(self, pieces, kind):
        tokenizer = pieces if kind == "sentencepiece" else ByteTokenizer()
        model = ManyOracle(tokenizer, looks=True)
        model.first_only = True
        asked = questions(tokenizer, keys=1, values=3, form="adjacent")
        outcomes = outcomes_of(model, asked, [(6, 4)], batch=2)
        assert sum(outcome.right for outcome in outcomes) == 4
        (length,) = figures(outcomes, DEPTHS, {})["lengths"]
        assert (length["samples"], length["all"]) == (12, 1 / 3)

    @pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
    @pytest.mark.parametrize("name", MANY)
    def test_prompts_go_on_with_the_right_answers_up_to_the_end(self, pieces, kind, name):
        tokenizer = pieces if kind == "sentencepiece" else ByteTokenizer()
        asked = questions(tokenizer, n=96, **MANY[name])
        for number in range(5):
            made = asked.make(12, number, 5)
            for one, other in pairwise(made):
                assert np.array_equal(other.prompt[: len(one.prompt)], one.prompt)
                between = tokenizer.decode(other.prompt[len(one.prompt) :].tolist())
                assert between.startswith(one.answer)
            assert len(made[-1].prompt) == 12 * 96 - len(made[-1].answer)
            assert {question.before % 96 for question in made} == {0}
            (before,) = {question.before for question in made}
            text = tokenizer.decode(made[0].prompt[:before].tolist())
            tail = tokenizer.decode(made[0].prompt[before:].tolist())
            assert all(question.answer in text for question in made)
            assert not any(question.answer in tail for question in made)

    def test_bytes_are_those_of_the_generator(self):
        config = PasskeyConfig(segment_length=N, form="adjacent", keys=9, queries="all")
        made = Questions(config, ByteTokenizer(), 1, seed=4).make(7, 0, 1)
        whole = text_of(ByteTokenizer(), made[-1]) + made[-1].answer
        assert len(whole) == 7 * N - 1
        (begin,) = {question.before for question in made}
        assert begin == 5 * N
        for segment in (whole[begin - 1 : begin + N - 1], whole[begin + N - 1 :]):
            assert re.search(r" \w{4}=\d{5}$", segment)
        asked = re.findall(r"(\w{4})=(\d{5})", whole[begin - 1 :])
        assert [number for _, number in asked] == [question.answer for question in made]
        assert set(asked) == set(re.findall(r"(\w{4})=(\d{5})\. ", whole[: begin - 1]))


def text_of(tokenizer, question) -> str:
    return tokenizer.decode(question.prompt.tolist())


class TestQuestions:
    @pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
    def test_key_is_at_its_depth_and_told_cut_or_whole(self, pieces, kind):
        tokenizer = pieces if kind == "sentencepiece" else ByteTokenizer()
        asked, samples, segments = questions(tokenizer), 40, 17
        made = [asked.make(segments, number, samples)[0] for number in range(samples)]
        assert Counter(question.depth for question in made) == dict.fromkeys(range(DEPTHS), 10)
        assert {question.cut for question in made} == {False, True}
        for question in made:
            assert len(question.prompt) == segments * N - 5
            assert question.prompt[0] == tokenizer.bos_id
            statement = f"The pass key is {question.answer}. Remember it."
            text = text_of(tokenizer, question)
            room = len(text) * (segments - 1) / segments - len(statement)
            place = text.index(statement) / room * DEPTHS
            assert question.depth - 0.2 < place < question.depth + 1.2
            whole = [
                f"{statement} {question.answer} is the pass key." in tokenizer.decode(part.tolist())
                for part in np.split(question.prompt, range(N, segments * N, N))
            ]
            assert question.cut != any(whole)

    def test_bytes_are_those_of_the_generator(self):
        (question,) = questions().make(5, 0, 1)
        assert text_of(ByteTokenizer(), question).endswith("? The pass key is ")

    def test_few_samples_are_spread_over_the_depths(self):
        assert [questions().make(3, number, 2)[0].depth for number in range(2)] == [1, 3]

    def test_are_a_function_of_seed_length_and_number(self):
        first, again, other = (questions().make(3, number, 9)[0] for number in (0, 0, 1))
        assert np.array_equal(first.prompt, again.prompt)
        assert first.answer != other.answer

    def test_segments_too_short_for_the_question_are_named(self, pieces):
        with pytest.raises(UserError, match="segment_length"):
            questions(n=16).make(3, 0, 1)
        with pytest.raises(UserError, match="segment_length"):
            questions(pieces, n=8).make(3, 0, 1)


def test_defaults_ask_less_of_long_documents():
    assert [default_samples(n) for n in (16, 256, 1024, 8192)] == [64, 64, 32, 8]


@pytest.mark.parametrize("batch", [1, 5])
def test_tokens_of_a_call_are_bounded_whatever_the_length(batch):
    model = KeyOracle(ByteTokenizer(), looks=True)
    outcomes = outcomes_of(model, questions(), [(900, 5)], batch=batch)
    assert all(outcome.right for outcome in outcomes)
    assert max(model.calls) <= CALL_TOKENS
    assert sum(model.calls) == 5 * 899 * N


@pytest.mark.parametrize("rule", RULES)
def test_answers_of_a_model_are_those_of_reading_all_at_once(rule):
    config = tiny.model_config(
        vocab_size=258, segment_length=N, initializer_range=0.5, memory_rule=rule
    )
    model, asked = InfiniTransformer(config).eval(), questions()
    made = [asked.make(20, number, 2)[0] for number in range(2)]
    prompts = np.stack([question.prompt for question in made])
    before = torch.from_numpy(prompts[:, : 19 * N])
    _, memory = read_text(model, [before], None, call_width(N, 2))
    written = model.generate(
        torch.tensor(prompts[:, 19 * N :].astype(np.int64)), 5, temperature=0.0, memory=memory
    )
    whole = model.generate(torch.tensor(prompts.astype(np.int64)), 5, temperature=0.0)
    assert torch.equal(written, whole)


def test_command_reports_in_every_form(run, tmp_path, capsys):
    arguments = ["passkey", str(run), "--segments", "3,5", "--samples", "4", "--depths", "2"]
    arguments += ["--json", str(tmp_path / "figures.json"), "--step", "1"]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "pass key of 5 digits found, percent" in shown
    for name in ("segments", "all", "whole", "cut", "ablated"):
        assert name in shown
    report = json.loads((tmp_path / "figures.json").read_text())
    assert [length["segments"] for length in report["lengths"]] == [3, 5]
    assert report["step"] == 1
    assert [length["samples_by_depth"] for length in report["lengths"]] == [[2, 2], [2, 2]]
    assert (run / "passkey.png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(run / "tensorboard" / "passkey")).Reload()
    assert events.Tags()["images"] == ["passkey/by_length_and_depth"]
    (event,) = events.Scalars("passkey/all/segments_5")
    assert (event.step, event.value) == (1, report["lengths"][1]["all"])


def test_command_asks_for_several_keys(run, tmp_path, capsys):
    """The run has keys of its own, which the options replace."""
    arguments = ["passkey", str(run), "--segments", "4", "--samples", "3", "--depths", "1"]
    arguments += ["--json", str(tmp_path / "figures.json")]
    arguments += ["--keys", "4", "--form", "adjacent"]
    shown = {
        "3": "4 keys, 3 asked, form adjacent", "all": "4 keys, 4 asked, form adjacent",
        "1": "4 keys, form adjacent",
    }  # fmt: skip
    for queries, words in shown.items():
        assert cli.main([*arguments, "--queries", queries]) == 0
        assert words in " ".join(capsys.readouterr().out.split())
        report = json.loads((tmp_path / "figures.json").read_text())
        count = 4 if queries == "all" else int(queries)
        assert report["lengths"][0]["samples"] == 3 * count
        names = ("keys", "queries", "values", "form")
        assert [report[name] for name in names] == [4, count, 1, "adjacent"]
        assert report["task"] == ("niah_multikey" if count == 1 else "niah_multiquery")
    assert cli.main([*arguments, "--form=variables", "--keys=1", "--values=3"]) == 0
    report = json.loads((tmp_path / "figures.json").read_text())
    assert (report["task"], report["lengths"][0]["samples"]) == ("vt", 9)


def test_questions_are_by_default_as_the_run_was_trained():
    own = PasskeyConfig(segment_length=2048, keys=[2, 4], queries=2, values=3, form="adjacent")
    none = PasskeyOptions([3], 1, 1, None, None, None, None, None, None, 0)
    made = settings_of(own, N, none)
    assert (made.segment_length, made.keys, made.queries) == (N, 4, 2)
    assert (made.values, made.form, made.filler) == (3, "adjacent", "standard")
    made = settings_of(own, N, none._replace(keys=3, queries="all", values=1, form="sentence"))
    assert (made.keys, made.queries, made.values, made.form) == (3, "all", 1, "sentence")


def test_more_queries_than_keys_are_refused(run, capsys):
    assert cli.main(["passkey", str(run), "--keys", "2", "--queries", "3"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--queries (3) must be at most the keys of a document (2), or all" in line


@pytest.mark.parametrize("plain", [True, False], ids=["bytes", "pieces"])
def test_too_short_segments_are_told_by_the_models_setting(pieces, plain):
    asked = questions(None if plain else pieces, n=16, keys=3)
    with pytest.raises(UserError, match=r"^model\.segment_length \(16\): too short.*--keys$"):
        asked.make(4, 0, 1)


@pytest.mark.parametrize("segments", [10**11, 10**30])
def test_documents_that_no_memory_holds_are_refused(run, capsys, segments):
    assert cli.main(["passkey", str(run), "--segments", str(segments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "must be at most 16,777,216 of this model's, which have 64 tokens" in line
