"""Stories are right by an independent reader, and documents hide them as they should."""

import itertools
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from infini_ds.config import FEWEST_FACTS, BabilongConfig, DataConfig, TokenizerConfig
from infini_ds.data.babilong import Babilong, BabilongDocument, babilong_random
from infini_ds.data.babilong_world import (
    OBJECTS,
    PERSONS,
    PLACES,
    all_answers,
    all_facts,
    all_questions,
    chance,
    tell,
)
from infini_ds.data.lanes import held_out_plans
from infini_ds.data.prepare import prepare
from infini_ds.data.sentencepiece_tokenizer import train_sentencepiece
from infini_ds.data.store import Store
from infini_ds.data.tokenizer import load_tokenizer
from infini_ds.data.tokenizer_base import ByteTokenizer
from infini_ds.data.windows import read_windows
from infini_ds.errors import UserError
from tests.data.bab_reader import answer_to, contradictions, facts_in

N = 128
TASKS = list(FEWEST_FACTS)
each_task = pytest.mark.parametrize("task", TASKS)
QUESTION = re.compile(r" (W[a-z]+ (?:is|was|has) [\w ]+\?)$")
WORD = "abcdefghij"
each_way_of_answering = pytest.mark.parametrize("steps", [False, True])
OWN = {
    "qa1": "Where is Mary?", "qa2": "Where is the key?",
    "qa3": "Where was the key before the office?", "qa8": "What is Mary carrying?",
}  # fmt: skip
"""Each task's question, with one name in place of all."""


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Lines of words that are all whole or visibly cut."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = (" ".join(f"{WORD}{i:03d}{j}" for j in range(6)) for i in range(300))
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory, text) -> Path:
    """A sentencepiece model with pieces of several characters."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    lines = [*text.read_text().splitlines(), *all_facts(), *all_questions()]
    train_sentencepiece(iter(lines), 400, path)
    return path


@pytest.fixture(params=["bytes", "sentencepiece"])
def tokenizer(request, model):
    return ByteTokenizer() if request.param == "bytes" else load_tokenizer(request.param, model)


def maker(tokenizer=None, **settings) -> Babilong:
    config = BabilongConfig(**({"segment_length": N, "filler": "standard"} | settings))
    return Babilong(config, tokenizer or ByteTokenizer())


def documents_of(made: Babilong, task, segments: int, count: int = 50, use: int = 1):
    return [
        made.document(babilong_random(use, task, segments, number), task, segments)
        for number in range(count)
    ]


def prompt_of(document: BabilongDocument) -> list[str]:
    """Everything before the last answer."""
    return [*document.pieces, *itertools.chain(*document.asked)][:-1]


class TestReader:
    """The reader of the tests itself, on stories with known answers."""

    STORY = (
        "Mary went to the garden. John took the apple. John went to the office. "
        "Mary moved to the cellar. John dropped the apple. John moved to the stable. "
        "Mary picked up the key. Mary took the milk."
    )

    @pytest.mark.parametrize(
        ("question", "answer"),
        [
            ("Where is Mary?", "cellar"), ("Where is the apple?", "office"),
            ("What is John carrying?", "nothing"), ("What is Mary carrying?", "key, milk"),
            ("Where is the milk?", "cellar"), ("Who has the milk?", "Mary"),
            ("Who has the apple?", "nobody"),
        ],
    )  # fmt: skip
    def test_answers(self, question, answer):
        assert answer_to(facts_in(self.STORY), question) == answer

    @pytest.mark.parametrize(
        ("question", "answer"),
        [
            ("Where is the milk?", "Mary, cellar"), ("Where is the apple?", "nobody, office"),
            ("Where is Mary?", "cellar"), ("What is Mary carrying?", "key, milk"),
        ],
    )  # fmt: skip
    def test_answers_with_steps(self, question, answer):
        assert answer_to(facts_in(self.STORY), question, steps=True) == answer

    def test_asks_for_the_place_before(self):
        story = "Ann took the key. Ann went to the a. Ann went to the b. Ann went to the a."
        assert answer_to(facts_in(story), "Where was the key before the a?") == "b"
        assert answer_to(facts_in(story), "Where was the key before the b?") == "a"

    @pytest.mark.parametrize(
        "wrong",
        [
            "Ann took the key. Bob took the key.", "Ann went to the a. Ann moved to the a.",
            "Ann dropped the key.",
            "Ann went to the a. Ann took the key. Ann dropped the key. Bob took the key.",
        ],
    )  # fmt: skip
    def test_finds_contradictions(self, wrong):
        assert len(contradictions(facts_in(wrong))) == 1


class TestStories:
    @each_task
    @each_way_of_answering
    @pytest.mark.parametrize("more", [0, 1, 4, 20])
    def test_are_answered_right_and_without_contradictions(self, task, steps, more):
        count = FEWEST_FACTS[task] + more
        for number in range(150):
            story = tell(babilong_random(1, task, number), task, count, answer_steps=steps)
            facts = facts_in(" ".join(story.facts))
            assert len(facts) == count
            assert contradictions(facts) == []
            ((question, answer),) = story.asked
            assert answer_to(facts, question, steps) == answer, story

    @each_task
    @each_way_of_answering
    def test_use_only_sentences_that_are_known(self, task, steps):
        known = set(all_facts()), set(all_questions()), set(all_answers())
        stories = [
            tell(babilong_random(1, task, number), task, 12, answer_steps=steps)
            for number in range(200)
        ]
        for facts, ((question, answer),) in stories:
            assert set(facts) <= known[0]
            assert question in known[1]
            assert answer in known[2]

    @each_task
    @each_way_of_answering
    @pytest.mark.parametrize("more", [0, 5])
    def test_without_the_facts_no_guess_is_better_than_chance(self, task, steps, more):
        count = FEWEST_FACTS[task] + more
        stories = [
            tell(babilong_random(2, task, number), task, count, answer_steps=steps)
            for number in range(1500)
        ]
        guesses: dict[str, Counter[str]] = {}
        for _, ((question, answer),) in stories:  # qa3's best guess may depend on the place named
            named = question.split()[-1] if task == "qa3" else ""
            guesses.setdefault(named, Counter())[answer] += 1
        reached = sum(max(counts.values()) for counts in guesses.values()) / 1500
        assert chance(task, steps) - 0.02 < reached < chance(task, steps) + 0.06
        if task == "qa8" and more:
            assert {story.asked[0].answer.count(",") for story in stories} == {0, 1, 2}

    @pytest.mark.parametrize("task", ["qa1", "qa3", "qa8"])
    def test_only_places_of_objects_have_steps_in_their_answers(self, task):
        for number in range(100):
            plain, stepwise = (
                tell(babilong_random(1, task, number), task, 8, answer_steps=steps)
                for steps in (False, True)
            )
            assert plain == stepwise

    @each_task
    def test_several_questions_are_different_and_all_answered_right(self, task):
        counts = set()
        for number in range(150):
            story = tell(babilong_random(1, task, number), task, 12, most_questions=3)
            facts = facts_in(" ".join(story.facts))
            assert all(answer_to(facts, question) == answer for question, answer in story.asked)
            assert len(set(story.asked)) == len(story.asked)
            counts.add(len(story.asked))
        assert counts == {1, 2, 3}

    @pytest.mark.parametrize(
        ("task", "steps"),
        [
            ("qa1", set()),
            ("qa2", {"Where is Mary?", "What is Mary carrying?", "Who has the key?"}),
            ("qa3", {
                "Where is Mary?", "Where is the key?", "What is Mary carrying?", "Who has the key?",
            }),
            ("qa8", {"Who has the key?"}),
        ],
    )  # fmt: skip
    def test_questions_about_single_steps_follow_those_of_the_task(self, task, steps):
        """The task's own come first, or the answers to steps would give theirs away."""
        kinds = set()
        for number in range(200):
            asked = [q for q, _ in tell(babilong_random(1, task, number), task, 12, 20).asked]
            asked = [re.sub("|".join(PERSONS), "Mary", q) for q in asked]
            asked = [re.sub("|".join(OBJECTS), "key", q) for q in asked]
            own = [re.sub("|".join(PLACES), "office", q) == OWN[task] for q in asked]
            assert own == sorted(own, reverse=True)
            assert own[0]
            kinds |= {q for q, of_task in zip(asked, own, strict=True) if not of_task}
        assert kinds == steps

    def test_later_facts_override_earlier_ones(self):
        """The answer is often not the last place that was told, nor that of the first fact."""
        for task in ("qa1", "qa2"):
            last = first = 0
            for number in range(300):
                story = tell(babilong_random(3, task, number), task, 8)
                places = [f.what for f in facts_in(" ".join(story.facts)) if f.act == "move"]
                last += story.asked[0].answer == places[-1]
                first += story.asked[0].answer == places[0]
            assert 0.2 * 300 < last < 0.8 * 300
            assert first < 0.5 * 300

    def test_are_those_of_other_machines(self):
        # Stores made on two machines must be equal: this must never change.
        facts, ((question, answer),) = tell(babilong_random(0, "qa3", 2, 0), "qa3", 5)
        assert facts == [
            "Anna moved to the stable.", "Anna took the lamp.", "Anna went to the kitchen.",
            "Anna went to the cellar.", "Anna went to the garden.",
        ]  # fmt: skip
        assert (question, answer) == ("Where was the lamp before the kitchen?", "stable")
        (document,) = documents_of(maker(filler="noise"), "qa1", 2, 1, use=0)
        assert document.asked[0].answer == " kitchen."
        assert document.pieces[0].startswith(" bl z pj l wkcamywaqpijca nejo")


class TestDocuments:
    @each_task
    @pytest.mark.parametrize("segments", [2, 3, 16])
    @pytest.mark.parametrize("filler", ["standard", "noise", "text"])
    @pytest.mark.parametrize("max_questions", [1, 9])
    def test_fill_their_segments_and_keep_facts_before_the_last(
        self, tokenizer, text, task, segments, filler, max_questions
    ):
        made = maker(tokenizer, filler=filler, text_files=[str(text)], max_questions=max_questions)
        for document in documents_of(made, task, segments, 8):
            pieces = prompt_of(document)
            tokens = [tokenizer.encode_array(piece, begins=not i) for i, piece in enumerate(pieces)]
            assert sum(map(len, tokens)) == segments * N - made.longest_answer - 1
            longest = max(
                len(tokenizer.encode_array(answer, False)) for _, answer in document.asked
            )
            assert longest <= made.longest_answer
            head = tokenizer.decode(np.concatenate(tokens)[: (segments - 1) * N - 1])
            whole = "".join(pieces)
            whole.encode("ascii")
            told = facts_in(head)
            assert told == facts_in(" ".join(document.facts)) == facts_in(whole)
            assert whole.endswith(document.asked[-1].question)
            for question, answer in document.asked:
                assert QUESTION.fullmatch(question)
                assert answer == f" {answer_to(told, question[1:])}."

    def test_words_of_facts_are_tokens_of_a_tokenizer_that_is_trained_on_them(self, tmp_path):
        tokenizer = {"kind": "sentencepiece", "vocab_size": 1500}
        made = {"segments": [2, 16], "documents": 150, "filler": "text"}
        store = prepare(data_config(tmp_path, tokenizer=tokenizer, **made), workers=1)
        words = {word.strip(".?") for fact in all_facts() for word in fact.split()}
        split = [word for word in words if len(store.tokenizer.encode_array(f" {word}", False)) > 1]
        assert split == []

    def test_ask_as_much_as_fits_into_a_segment(self):
        made = maker(max_questions=9, min_facts=8)
        counts = Counter(len(d.asked) for d in documents_of(made, "qa1", 16, 100))
        assert set(counts) == {1, 2, 3, 4}  # a fifth would need more than the 128 bytes

    def test_never_cut_words(self, tokenizer, text):
        made = maker(tokenizer, filler="text", text_files=[str(text)])
        for document in documents_of(made, "qa2", 6):
            words = "".join(document.pieces)
            for sentence in document.facts:
                words = words.replace(sentence, "", 1)
            cut = [word for word in words.split() if not re.fullmatch(rf"{WORD}\d{{4}}", word)]
            assert cut == []
            assert len(words.split()) > 20

    def test_have_little_but_text(self, tokenizer, text):
        made = maker(tokenizer, filler="text", text_files=[str(text)])
        for document in documents_of(made, "qa1", 12):
            whole = "".join(document.pieces)
            assert len(whole) - len(" ".join(whole.split())) < 0.05 * len(whole) + 20

    def test_facts_are_anywhere_before_the_last_segment(self):
        made = maker(max_facts=4, min_facts=4)
        places = []
        for document in documents_of(made, "qa1", 33, 300):
            whole = "".join(document.pieces)
            found = [whole.index(document.facts[0]), whole.rindex(document.facts[-1])]
            places += [place / (32 * N) for place in found]
        first, last = np.array(places).reshape(-1, 2).T
        assert first.mean() == pytest.approx(0.2, abs=0.04)
        assert last.mean() == pytest.approx(0.8, abs=0.04)

    def test_have_as_many_facts_as_asked_where_there_is_room(self):
        made = maker(min_facts=3, max_facts=6)
        counts = {len(document.facts) for document in documents_of(made, "qa1", 8, 100)}
        assert counts == {3, 4, 5, 6}
        short = {len(document.facts) for document in documents_of(made, "qa1", 2, 100)}
        assert short == {3, 4}

    def test_are_a_function_of_their_random_numbers(self):
        one, two = (documents_of(maker(filler="noise"), "qa3", 4, 5) for _ in range(2))
        assert one == two
        assert len({document.pieces[0] for document in one}) == 5

    def test_of_thousands_of_segments_are_fast(self):
        made = maker()
        began = time.process_time()
        (document,) = documents_of(made, "qa8", 8192, 1)
        assert time.process_time() - began < 1  # about 5 ms on an idle core
        assert len("".join(prompt_of(document))) == 8192 * N - made.longest_answer - 1

    def test_of_text_that_is_uneven_in_tokens_are_full_of_words_and_fast(self, tmp_path, model):
        """A third of the text has several times as many tokens as equally long others."""
        path = tmp_path / "uneven.txt"
        path.write_text(f"{'went to the garden ' * 2000}{'qxz jvk wqy zxj vkq ' * 1000}" * 8)
        tokenizer = load_tokenizer("sentencepiece", model)
        made = maker(tokenizer, filler="text", text_files=[str(path)])
        began = time.process_time()
        documents = documents_of(made, "qa2", 1024, 4)
        assert time.process_time() - began < 20  # about 1 s on an idle core
        for document in documents:
            assert document.pieces.count(" ") <= 64
            tokens = [tokenizer.encode_array(p, not i) for i, p in enumerate(prompt_of(document))]
            assert sum(map(len, tokens)) == 1024 * N - made.longest_answer - 1

    def test_refuse_segments_that_are_too_short(self):
        says = r"^data\.babilong\.segment_length \(58\) must be at least 59 for a question"
        with pytest.raises(UserError, match=says):
            documents_of(maker(segment_length=58), "qa1", 2)
        says = r"2 segments have room for 2 facts before the last one, and qa3 needs 3; use longer"
        with pytest.raises(UserError, match=says):
            documents_of(maker(segment_length=64), "qa3", 2)

    def test_refuse_text_files_without_words(self, tmp_path):
        (tmp_path / "a.txt").write_text("x" * 100)
        made = maker(filler="text", text_files=[str(tmp_path / "a.txt")])
        with pytest.raises(UserError, match=r"^data\.babilong\.text_files: have too few words"):
            documents_of(made, "qa1", 2)
        with pytest.raises(UserError, match=r"^data\.babilong\.text_files .*none: no such file"):
            maker(filler="text", text_files=[str(tmp_path / "none")])

    def test_refuse_a_tokenizer_without_a_space(self):
        class Spaceless(ByteTokenizer.__base__):
            def __init__(self):
                super().__init__([b"a", b"", b""], 1, 2, "spaceless")

            def _encode_piece(self, text, begins):
                return [0] * text.count("a")

        with pytest.raises(UserError, match=r"^data\.tokenizer: has no token for a space"):
            maker(Spaceless())


TRAINED = {"kind": "sentencepiece", "vocab_size": 400}


def data_config(folder, model=None, tokenizer=None, **settings) -> DataConfig:
    if model:
        tokenizer = {"kind": "sentencepiece", "model": str(model)}
    tokenizer = tokenizer or {"kind": "bytes"}
    made = {"segment_length": N, "segments": [2, 4], "documents": 15, "filler": "standard"}
    return DataConfig(
        source="babilong",
        store=str(folder / "store"),
        tokenizer=TokenizerConfig(**tokenizer),
        held_out_fraction=0.1,
        babilong=BabilongConfig(**(made | settings)),
    )


class TestCorpus:
    @pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "trained"])
    def test_store_has_documents_of_whole_segments_and_weighs_answers(self, tmp_path, model, kind):
        tokenizer = TRAINED if kind == "trained" else None
        config = data_config(tmp_path, model if kind == "sentencepiece" else None, tokenizer)
        store = prepare(config, workers=1)
        room = Babilong(config.babilong, store.tokenizer).longest_answer
        counts: Counter[tuple[int, str]] = Counter()
        for name in ("train", "held_out"):
            split = store.split(name)
            assert split.weights is not None
            for document, stored in enumerate(split.lengths.tolist()):
                begin = split.offsets[document]
                tokens = split.data[begin : begin + stored]
                weights = split.weights[begin : begin + stored]
                told = store.tokenizer.decode(tokens)
                prompt, _, answer = told.rpartition("? ")
                asked = prompt[prompt.rindex(" W") + 1 :] + "?"
                assert answer == answer_to(facts_in(prompt), asked) + "."
                size = int((weights > 1).sum())
                segments = -(-(stored - 1) // N)
                assert stored - 1 == segments * N - room + size
                expected = [0] + [1] * (stored - size - 2)
                weight = np.float32(1 + (stored - 1) / size)
                assert weights.tolist() == [*expected, *[weight] * size, 1]
                assert store.tokenizer.decode(tokens[-1 - size : -1]) == f" {answer}"
                counts[segments, asked.split()[1]] += 1
        assert sum(counts.values()) == 4 * 2 * 15
        assert {segments for segments, _ in counts} == {2, 4}
        assert counts[2, "was"] == counts[4, "was"] == 15

    @pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
    def test_all_answers_of_a_document_have_one_weight(self, tmp_path, model, kind):
        config = data_config(
            tmp_path, model if kind == "sentencepiece" else None, tasks=["qa1"], max_questions=4
        )
        store = prepare(config, workers=1)
        split, several = store.split("train"), 0
        assert split.weights is not None
        for begin, stored in zip(split.offsets.tolist(), split.lengths.tolist(), strict=False):
            tokens = split.data[begin : begin + stored]
            weights = split.weights[begin : begin + stored]
            answers = weights > 1
            weight = np.float32(1 + (stored - 1) / answers.sum())
            assert set(weights[answers].tolist()) == {weight}
            told = store.tokenizer.decode(tokens)
            facts = facts_in(told)
            asked = re.findall(r" (Where is \w+\?) (\w+)\.", told)
            assert asked
            assert all(answer_to(facts, question) == answer for question, answer in asked)
            assert store.tokenizer.decode(tokens[answers]).split() == [f"{a}." for _, a in asked]
            several += len(asked) > 1
        assert several > 3

    def test_windows_have_one_answer_for_each_document(self, tmp_path):
        split = prepare(data_config(tmp_path), workers=1).split("train")
        documents = np.flatnonzero(split.lengths > 2 * N + 1)
        for plan in held_out_plans(split.lengths[documents], N, 4, 2, 0):
            plan = plan._replace(documents=documents[plan.documents])
            windows = read_windows(split, plan, slice(None), N)
            for row in np.flatnonzero(plan.lengths[:, 0]):
                weights = windows.weights[row].flatten()
                answer = windows.labels[row].flatten()[weights > 1].tolist()
                assert re.fullmatch(rb" [a-z, ]+\.", bytes(answer))

    def test_trained_tokenizer_knows_the_words_of_facts(self, tmp_path):
        store = prepare(data_config(tmp_path, tokenizer=TRAINED), workers=1)
        for word in (" Mary", " kitchen", " went"):
            assert len(store.tokenizer.encode_array(word, False)) == 1

    def test_other_settings_are_refused(self, tmp_path):
        config = data_config(tmp_path)
        prepare(config, workers=1)
        Store.open(config.store, config)
        for change, setting in (
            ({"tasks": ["qa1"]}, "tasks"),
            ({"max_facts": 9}, "max_facts"),
            ({"answer_steps": True}, "answer_steps"),
        ):
            with pytest.raises(UserError, match=rf"^data\.babilong\.{setting} is .* made with"):
                Store.open(config.store, data_config(tmp_path, **change))

    def test_prepare_notices_that_text_files_changed(self, tmp_path):
        path = tmp_path / "a.txt"
        path.write_text("some words of a text\n" * 9)
        config = data_config(tmp_path, filler="text", text_files=[str(path)])
        prepare(config, workers=1)
        prepare(config, workers=1)
        path.write_text("other words")
        with pytest.raises(UserError, match=r"^data\.babilong\.text_files: files have changed"):
            prepare(config, workers=1)

    def test_several_workers_make_the_same_store(self, tmp_path):
        one = prepare(data_config(tmp_path / "one"), workers=1)
        two = prepare(data_config(tmp_path / "two"), workers=2)
        assert one.manifest["files"] == two.manifest["files"]


def test_module_needs_no_torch():
    code = "import sys, infini_ds.data.babilong; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"torch", "deepspeed"}
