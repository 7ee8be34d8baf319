"""Questions about facts are counted rightly, and nothing but the memory can answer them."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from infini_ds import cli
from infini_ds.config import FEWEST_FACTS, BabilongConfig
from infini_ds.data.babilong_world import all_facts, all_questions
from infini_ds.data.sentencepiece_tokenizer import SentencePieceTokenizer, train_sentencepiece
from infini_ds.data.tokenizer_base import ByteTokenizer
from infini_ds.errors import UserError
from infini_ds.evaluation.babilong import BabilongOptions, Questions, measure, with_options
from infini_ds.evaluation.babilong_report import Outcome, figures
from infini_ds.model.reading import CALL_TOKENS
from tests.data.bab_reader import answer_to, facts_in
from tests.evaluation.oracle import Oracle, Progress
from tests.tiny_run import tiny_config, write_checkpoint

torch.set_num_threads(1)

N = 96
TASKS = list(FEWEST_FACTS)


def questions(tokenizer=None, n=N, **changes) -> Questions:
    config = BabilongConfig(**({"segment_length": n, "filler": "standard"} | changes))
    return Questions(config, tokenizer or ByteTokenizer(), seed=0)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> SentencePieceTokenizer:
    """A tokenizer with pieces of several characters."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece(iter([*all_facts(), *all_questions()] * 2), 380, path)
    return SentencePieceTokenizer(path.read_bytes(), "made here")


class FactOracle(Oracle):
    """Finds the answer by the facts of the text.

    Args:
        forgets: leave out the last of so many facts.
        says: text to put after each answer.
    """

    def __init__(self, tokenizer, says: str = ".", forgets: int = 0):
        super().__init__(tokenizer, N)
        self.says, self.forgets = says, forgets

    def answer(self, row: list[int], reads: bool) -> list[int]:
        text = self.tokenizer.decode(row)
        assert reads == (row[0] == self.tokenizer.bos_id)
        facts = facts_in(text)
        facts = facts[: len(facts) - self.forgets]
        answer = answer_to(facts, text[text.rindex(" W") + 1 :]) if facts else "the moon"
        return self.tokenizer.encode_array(f" {answer}{self.says}", False).tolist()


def outcomes_of(model, asked, plan, batch=3) -> list[Outcome]:
    return measure(model, model.tokenizer, asked, plan, batch, Progress())


class TestCounting:
    @pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
    @pytest.mark.parametrize("task", TASKS)
    def test_oracle_is_always_right_but_only_with_its_memory(self, pieces, kind, task):
        tokenizer = pieces if kind == "sentencepiece" else ByteTokenizer()
        plan = [(task, 6, 10), (task, 9, 4)]
        outcomes = outcomes_of(FactOracle(tokenizer), questions(tokenizer), plan)
        assert Counter(outcome.segments for outcome in outcomes) == {6: 10, 9: 4}
        assert {outcome.task for outcome in outcomes} == {task}
        assert all(outcome.right for outcome in outcomes)
        assert not any(outcome.right_ablated for outcome in outcomes)

    def test_older_news_is_wrong(self):
        outcomes = outcomes_of(
            FactOracle(ByteTokenizer(), forgets=1), questions(min_facts=4), [("qa1", 6, 40)]
        )
        assert 0 < sum(outcome.right for outcome in outcomes) < 40

    def test_answer_that_goes_on_is_wrong(self):
        """A list of which the right answer is only the beginning is another list."""
        outcomes = outcomes_of(
            FactOracle(ByteTokenizer(), says=", milk."), questions(), [("qa8", 4, 20)]
        )
        assert not any(outcome.right for outcome in outcomes)

    def test_figures_are_those_of_each_task_and_length(self):
        outcomes = [
            Outcome("qa1", 16, right=True, right_ablated=False),
            Outcome("qa1", 16, right=False, right_ablated=True),
            Outcome("qa1", 16, right=True, right_ablated=False),
            Outcome("qa1", 16, right=True, right_ablated=False),
            Outcome("qa1", 64, right=False, right_ablated=False),
            Outcome("qa3", 16, right=True, right_ablated=True),
        ]
        first, second, third = figures(outcomes, {"step": 7, "answer_steps": False})["results"]
        assert first == {
            "task": "qa1", "segments": 16, "samples": 4, "right": 0.75, "ablated": 0.25,
            "chance": 1 / 6,
        }  # fmt: skip
        assert (second["segments"], second["right"]) == (64, 0.0)
        assert (third["task"], third["samples"], third["chance"]) == ("qa3", 1, 0.2)

    @pytest.mark.parametrize(("steps", "chance"), [(False, 1 / 6), (True, 1 / 36)])
    def test_chance_depends_on_the_form_of_answers(self, steps, chance):
        outcome = Outcome("qa2", 16, right=True, right_ablated=False)
        (result,) = figures([outcome], {"step": 7, "answer_steps": steps})["results"]
        assert result["chance"] == pytest.approx(chance)

    def test_tokens_of_a_call_are_bounded_whatever_the_length(self):
        model = FactOracle(ByteTokenizer())
        outcomes = outcomes_of(model, questions(), [("qa2", 700, 4)], batch=4)
        assert all(outcome.right for outcome in outcomes)
        assert max(model.calls) <= CALL_TOKENS
        assert sum(model.calls) == 4 * 699 * N


class TestQuestions:
    @pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
    def test_prompts_of_a_length_are_equally_long_and_end_with_the_question(self, pieces, kind):
        tokenizer = pieces if kind == "sentencepiece" else ByteTokenizer()
        asked = questions(tokenizer)
        made = [asked.make(task, 5, number) for task in TASKS for number in range(10)]
        longest = max(len(question.prompt) for question in made)
        assert {len(question.prompt) for question in made} == {longest}
        assert 4 * N < longest < 5 * N
        for question in made:
            assert question.prompt[0] == tokenizer.bos_id
            text = tokenizer.decode(question.prompt.tolist())
            assert text.endswith("?")
            answer = answer_to(facts_in(text), text[text.rindex(" W") + 1 :])
            assert question.answer == f" {answer}."
            assert longest + question.answer_tokens <= 5 * N
            last = tokenizer.decode(question.prompt[4 * N :].tolist())
            assert facts_in(last) == []

    def test_are_a_function_of_seed_task_length_and_number(self):
        first, again, other = (questions().make("qa2", 3, number) for number in (0, 0, 1))
        assert np.array_equal(first.prompt, again.prompt)
        assert not np.array_equal(first.prompt, other.prompt)

    def test_are_not_those_of_training(self):
        from infini_ds.data.babilong import Babilong, babilong_random

        made = Babilong(BabilongConfig(segment_length=N, filler="noise"), ByteTokenizer())
        trained = made.document(babilong_random(0, "qa1", 3, 0), "qa1", 3).pieces[0]
        asked = questions(filler="noise").make("qa1", 3, 0).prompt
        assert bytes(asked[1:].tolist()) != trained.encode()

    def test_segments_too_short_are_told_by_the_models_setting(self, pieces):
        short = [(questions(n=40), 9), (questions(n=64), 2), (questions(pieces, n=8), 3)]
        for asked, segments in short:
            with pytest.raises(UserError, match=r"^model\.segment_length \(\d+\): too short"):
                asked.make("qa3", segments, 0)


def test_options_replace_settings_of_the_run_and_give_every_task_its_facts():
    trained = BabilongConfig(tasks=["qa1"], max_facts=2, filler="noise")
    nothing = BabilongOptions(None, [4], None, None, None, 0)
    made = with_options(trained, nothing, 128)
    assert made == trained.model_copy(update={"segment_length": 128})
    made = with_options(trained, nothing._replace(tasks=["qa3", "qa1"], filler="text"), 128)
    assert (made.tasks, made.max_facts, made.filler) == (["qa3", "qa1"], 3, "text")


@pytest.fixture(scope="module")
def asked_run(tmp_path_factory):
    """A run of another source, with segments that are long enough for questions."""
    folder = tmp_path_factory.mktemp("babilong") / "run"
    write_checkpoint(tiny_config(folder, segment_length=N))
    return folder


def test_command_reports_in_every_form(asked_run, tmp_path, capsys):
    arguments = ["babilong", str(asked_run), "--segments", "3,5", "--samples", "4"]
    arguments += ["--tasks", "qa1,qa3", "--filler", "standard"]
    assert cli.main([*arguments, "--json", str(tmp_path / "figures.json")]) == 0
    shown = capsys.readouterr().out
    assert "facts found in text, percent" in shown
    for name in ("task", "chance", "memory", "ablated", "qa1", "qa3"):
        assert name in shown
    assert "qa8" not in shown
    report = json.loads((tmp_path / "figures.json").read_text())
    found = [(each["task"], each["segments"], each["samples"]) for each in report["results"]]
    assert found == [("qa1", 3, 4), ("qa1", 5, 4), ("qa3", 3, 4), ("qa3", 5, 4)]
    assert (report["step"], report["filler"], report["segment_length"]) == (9, "standard", N)
    assert (asked_run / "babilong.png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(asked_run / "tensorboard" / "babilong")).Reload()
    assert events.Tags()["images"] == ["babilong/by_task_and_length"]
    (event,) = events.Scalars("babilong/right/qa3/segments_5")
    assert (event.step, event.value) == (9, report["results"][3]["right"])


def test_command_asks_for_all_tasks_of_the_run(asked_run, tmp_path, capsys):
    picture = tmp_path / "map.png"
    arguments = ["babilong", str(asked_run), "--segments=4", "--samples=1", "--filler=noise"]
    assert cli.main([*arguments, f"--plot={picture}"]) == 0
    shown = capsys.readouterr().out
    assert all(task in shown for task in TASKS)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_documents_that_no_memory_holds_are_refused(asked_run, capsys):
    assert cli.main(["babilong", str(asked_run), "--segments", str(10**11)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"must be at most {(1 << 30) // N:,} of this model's, which have 96 tokens" in line


def test_segments_of_a_model_that_are_too_short_are_one_line(tmp_path, capsys):
    write_checkpoint(tiny_config(tmp_path / "run", segment_length=32))
    asked = ["babilong", str(tmp_path / "run"), "--segments=4", "--samples=1", "--filler=noise"]
    assert cli.main(asked) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("infini-ds: model.segment_length (32): too short for the facts")


@pytest.mark.parametrize("gone", [False, True])
def test_texts_that_facts_hide_in_are_found_from_anywhere(tmp_path, gone):
    started = tmp_path / "started"
    (started / "texts").mkdir(parents=True)
    (started / "texts" / "book.txt").write_text("a book of plain words, again and again\n" * 100)
    config = tiny_config(started / "run", segment_length=N)
    texts = {"filler": "text", "text_files": ["texts/*.txt"]}
    babilong = config.data.babilong.model_copy(update=texts)
    data = config.data.model_copy(update={"babilong": babilong})
    write_checkpoint(config.model_copy(update={"data": data}), directory=str(started))
    if gone:
        (started / "texts" / "book.txt").unlink()
    asked = ["--segments=3", "--samples=1", "--tasks=qa1", f"--plot={tmp_path / 'plot.png'}"]
    assert cli.main(["babilong", str(started / "run"), *asked]) == (2 if gone else 0)
