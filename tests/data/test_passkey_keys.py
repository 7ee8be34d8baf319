"""Pass-key documents with several keys, questions, values and forms."""

import hashlib
import re
from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from infini_ds.config import DataConfig, PasskeyConfig, TokenizerConfig
from infini_ds.data.passkey import NAMES, Passkeys, TooShort, gaps_before, passkey_random
from infini_ds.data.prepare import prepare
from infini_ds.data.store import Store
from infini_ds.errors import UserError

ADJACENT = re.compile(rb" ([A-Z][a-z]{3})=(\d{5})\. ")


def config_of(segment_length=128, **settings):
    return PasskeyConfig(segment_length=segment_length, **settings)


def documents_of(config, segments, count=100, **options):
    passkeys = Passkeys(config)
    return [
        passkeys.document(passkey_random(1, number), segments, **options) for number in range(count)
    ]


def segments_of(document, length):
    """The text of each segment, with ~ for BOS."""
    text = b"~" + b"".join(document.texts)
    return [text[begin : begin + length].decode() for begin in range(0, len(text), length)]


# Equal numbers make equal documents on all machines: these must never change.
BY_HAND = {
    "adjacent": (
        {"form": "adjacent", "keys": 2, "queries": "all"}, 40,
        ["~reen. The sky is blu Tina=04194. e. The",
         " sun is yello Dean=74500. w. Here we go.",
         " There and back a Tina=04194. Dean=74500"],
    ),
    "questions_of_two_segments": (
        {"form": "adjacent", "keys": 4, "queries": "all"}, 32,
        ["~The gra Omar=67993. ss is gree ",
         "Kurt=92713. n. T Zach=94937. he ",
         "sky i Sean=62651. s blue. The su",
         "n is yell Kurt=92713. Zach=94937",
         ".ow. Here Omar=67993. Sean=62651"],
    ),
    "values": (
        {"form": "adjacent", "keys": 2, "values": 2, "queries": "all", "digits": 3}, 40,
        ["~ky is blue Cora=450. . The sun is yel C",
         "ora=049. low. H Sean=041. e Sean=947. re",
         " we go. The Sean=041, 947. Cora=450, 049"],
    ),
    "values_in_sentences": (
        {"values": 2, "digits": 2}, 100,
        ["~sky is blue. The sun is yellow. Here we go. There and back again. "
         "The grass is green A pass key is ",
         "04. Remember it. 04 is a pass key. . T A pass key is 19. Remember it. "
         "19 is a pass key. he sky is bl",
         "ue. The sun is yellow. Here we go. There and back a What are the pass keys? "
         "The pass keys are 04, 19"],
    ),
    "sentences": (
        {"keys": 2, "queries": 2, "digits": 2}, 100,
        ["~gain. The grass is green. The sky is blue. The sun  The pass key of Vera is 79. "
         "Remember it. 79 is ",
         "the pass key of Vera. is The pass key of Luis is 47. Remember it. "
         "47 is the pass key of Luis.  yello",
         "w. Here we go. There and back again. The gr What is the pass key of Luis? "
         "The pass key of Luis is 47",
         ".ass is green. The sky is blue. The sun is  What is the pass key of Vera? "
         "The pass key of Vera is 79"],
    ),
    "variables": (
        {"form": "variables", "keys": 2, "values": 2, "queries": 2, "digits": 3}, 60,
        ["~ VAR Adam = 997. n. The VAR Lena = 477.  grass  VAR Pete = ",
         "VAR Adam. i VAR Toby = VAR Lena. s green. The sky is blue. T",
         "he sun is yello Which variables are 477? They are Lena, Toby",
         ".w. Here we go. Which variables are 997? They are Adam, Pete"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_document_is(name):
    settings, length, expected = BY_HAND[name]
    segments = len(expected)
    passkeys = Passkeys(config_of(length, **settings))
    document = passkeys.document(passkey_random(0, segments, 0), segments)
    assert segments_of(document, length) == expected


@pytest.mark.parametrize(
    ("keys", "digest"), [(1, "8bdd0bb9ad857f15"), (4, "21cfcafc1005c54c")], ids=["one", "four"]
)
def test_documents_of_earlier_stores_are_made_again(keys, digest):
    passkeys = Passkeys(config_of(256, keys=keys, filler="noise"))
    text = hashlib.sha256()
    for segments in (3, 8):
        for number in range(20):
            text.update(
                b"".join(passkeys.document(passkey_random(0, segments, number), segments).texts)
            )
    assert text.hexdigest()[:16] == digest


@pytest.mark.parametrize("queries", [1, 3, "all"])
def test_document_asks_for_as_many_keys_as_it_should(queries):
    for document in documents_of(config_of(keys=5, queries=queries, form="adjacent"), 4):
        stated = dict(ADJACENT.findall(b"".join(document.before)))
        assert len(stated) == 5
        asked = re.findall(rb"([A-Z][a-z]{3})=(\d{5})", b"".join(document.texts)[3 * 128 - 1 :])
        assert len(dict(asked)) == len(asked) == (5 if queries == "all" else queries)
        assert dict(asked).items() <= stated.items()
        assert [answer for _, answer in asked] == document.texts[1::2]


def test_some_keys_are_asked_for_of_which_there_is_any_number():
    documents = documents_of(config_of(keys=4, queries="some", form="adjacent"), 4)
    counts = Counter(len(document.questions) for document in documents)
    assert sorted(counts) == [1, 2, 3, 4]
    assert min(counts.values()) > 10


def test_keys_are_asked_for_in_any_order_whatever_the_order_of_their_statements():
    orders = [
        tuple(stated[0].piece for stated in document.stated)
        for document in documents_of(config_of(keys=3, queries="all", form="adjacent"), 4, 300)
    ]
    assert set(orders) == set(permutations((1, 3, 5)))
    assert min(map(orders.count, set(orders))) > 25


def test_depth_is_that_of_the_first_key_that_is_asked_for():
    for document in documents_of(config_of(keys=4, queries="all", form="adjacent"), 9, depth=0.0):
        assert document.stated[0][0] == (1, 0.0)
        assert document.position == 1
        assert all(0 < of_key[0].depth < 1 for of_key in document.stated[1:])
        for (stated,) in document.stated:
            begin = sum(map(len, document.before[: stated.piece]))
            room = sum(map(len, document.before[::2]))
            filler = sum(map(len, document.before[: stated.piece : 2]))
            assert stated.depth == pytest.approx(filler / room, abs=0.01)
            cut = (begin + 2) // 128 != (begin + 12) // 128
            assert document.is_cut(stated) == cut


@pytest.mark.parametrize("form", ["sentence", "adjacent"])
def test_values_of_a_key_are_asked_for_in_the_order_in_which_they_are_stated(form):
    mixed = False
    for document in documents_of(config_of(256, keys=2, values=3, queries=2, form=form), 6):
        before = b"".join(document.before)
        for question, stated in zip(document.questions, document.stated, strict=True):
            assert len(question) == 3
            assert list(stated) == sorted(stated)
            for asked, place in zip(question, stated, strict=True):
                assert asked.answer in document.before[place.piece]
            assert sorted(question, key=lambda asked: before.index(asked.answer)) == list(question)
        pieces = [place.piece for stated in document.stated for place in stated]
        mixed |= sorted(pieces) not in (pieces, pieces[3:] + pieces[:3])
    assert mixed  # the statements of one key do not stand together


def test_variables_lead_to_their_number_over_others_that_are_stated_before():
    for document in documents_of(config_of(form="variables", keys=3, values=4, queries="all"), 8):
        values = {}
        for name, source in re.findall(
            rb" VAR (\w+) = (?:VAR )?(\w+)\. ", b"".join(document.before)
        ):
            assert name not in values
            values[name] = values.get(source, source)
        assert len(values) == 12
        for question in document.questions:
            (number,) = re.findall(rb"Which variables are (\d+)\? They are ", question[0].question)
            names = [asked.answer for asked in question]
            assert names == [name for name, value in values.items() if value == number]
            assert len(names) == 4


@pytest.mark.parametrize("form", ["sentence", "adjacent", "variables"])
@pytest.mark.parametrize("segments", [6, 9])
def test_questions_end_the_last_segments_and_no_segment_cuts_one(form, segments):
    config = config_of(256, keys=7, values=2, queries="all", form=form)
    needed = set()
    for document in documents_of(config, segments + 8, 20):
        texts, begin = document.texts, 0
        assert sum(map(len, texts)) == (segments + 8) * 256 - 1
        before = sum(map(len, document.before)) + 1
        assert before % 256 == 0
        needed.add(segments + 8 - before // 256)
        begin = before
        for gap, question in zip(document.gaps, document.questions, strict=True):
            begin += len(gap)
            end = begin + sum(len(asked.question + asked.answer) for asked in question)
            assert begin // 256 == (end - 1) // 256
            begin = end
        assert begin == (segments + 8) * 256
    assert needed == {{"sentence": 3, "adjacent": 1, "variables": 2}[form]}


def test_gaps_before_questions_fill_segments():
    assert gaps_before([5], 8) == [3]
    assert gaps_before([4, 4], 8) == [0, 0]
    assert gaps_before([4, 5, 2, 1, 8], 8) == [4, 0, 0, 0, 0]
    assert gaps_before([3, 4, 2, 7], 8) == [1, 0, 6, 1]
    with pytest.raises(TooShort):
        gaps_before([3, 9], 8)


@pytest.mark.parametrize(
    ("settings", "segments", "says"),
    [
        ({"keys": 16, "queries": "all"}, 2, "16 keys of 5 digits, 16 asked, in 2 segments"),
        ({"keys": 16, "queries": "all"}, 4, "16 keys of 5 digits, 16 asked, in 4 segments"),
        ({"keys": 8, "values": 2}, 3, "8 keys of 5 digits with 2 values each in 3 segments"),
        ({"digits": 36}, 2, "1 key of 36 digits in 2 segments"),
    ],
)
def test_too_short_segments_say_what_is_needed(settings, segments, says):
    short = config_of(40, form="adjacent", **settings)
    with pytest.raises(TooShort) as caught:
        documents_of(short, segments, 1)
    found = re.fullmatch(
        r"data\.passkey\.segment_length \(40\) must be at least (\d+) for (.*)", str(caught.value)
    )
    assert found
    assert found[2] == says
    needed = int(found[1])
    documents_of(config_of(needed, form="adjacent", **settings), segments, 1)
    with pytest.raises(TooShort):
        documents_of(config_of(needed - 1, form="adjacent", **settings), segments, 1)


def test_more_variables_than_names_are_refused():
    Passkeys(config_of(keys=16, values=len(NAMES) // 16, form="variables"))
    with pytest.raises(UserError, match=r"^data\.passkey\.keys \(13\) x data\.passkey\.values \(5"):
        Passkeys(config_of(keys=13, values=5, form="variables"))
    with pytest.raises(UserError, match=r"^data\.passkey\.keys \(65\) must be at most 64"):
        Passkeys(config_of(keys=[1, 65]))


@pytest.mark.parametrize(
    ("settings", "task"),
    [
        ({}, "niah_single"), ({"queries": "all"}, "niah_single"), ({"keys": 4}, "niah_multikey"),
        ({"keys": [1, 2]}, "niah_multikey"), ({"keys": 4, "queries": 2}, "niah_multiquery"),
        ({"keys": [2, 4], "queries": "all", "form": "adjacent"}, "niah_multiquery"),
        ({"keys": [2, 4], "queries": "some", "form": "adjacent"}, "niah_multiquery"),
        ({"values": 4}, "niah_multivalue"), ({"form": "variables", "values": 5}, "vt"),
    ],
)  # fmt: skip
def test_tasks_have_the_names_of_the_field(settings, task):
    assert config_of(**settings).task == task


def data_config(folder, **settings):
    return DataConfig(
        source="passkey",
        store=str(folder / "store"),
        tokenizer=TokenizerConfig(kind="bytes"),
        held_out_fraction=0.2,
        passkey=config_of(
            **(
                {"segments": [2, 4], "documents": 30, "form": "adjacent", "queries": "all"}
                | settings
            )
        ),
    )


def texts_of(split):
    for document in range(len(split.lengths)):
        begin, end = split.offsets[document], split.offsets[document + 1]
        yield bytes(split.data[begin + 1 : end - 1].tolist()), split.weights[begin:end]


@pytest.mark.parametrize("values", [1, 2])
def test_answers_of_a_document_together_weigh_as_much_as_an_only_one(tmp_path, values):
    split = prepare(data_config(tmp_path, keys=3, values=values), workers=1).split("train")
    for text, weights in texts_of(split):
        positions = len(text) + 1
        answers = b"".join(re.findall(rb"=(\d{5}(?:, \d{5})*)", text)[-3:]).replace(b", ", b"")
        heavy = weights > 1
        assert bytes(np.frombuffer(text, np.uint8)[heavy[1:-1]].tolist()) == answers
        assert len(answers) == 15 * values
        assert set(weights[heavy].tolist()) == {np.float32(1 + positions / (15 * values))}
        assert (weights[~heavy][1:] == 1).all()
        assert weights.sum() == pytest.approx(2 * positions)


def test_a_list_of_keys_makes_documents_of_each_number_and_says_which(tmp_path):
    store = prepare(data_config(tmp_path, keys=[1, 2, 4]), workers=1)
    counts, seen = {}, set()
    for name in ("train", "held_out"):
        split = store.split(name)
        assert split.groups is not None
        assert split.groups.dtype == np.int32
        for (text, _), group, length in zip(
            texts_of(split), split.groups.tolist(), split.lengths, strict=True
        ):
            assert len(set(ADJACENT.findall(text))) == group
            pair = (group, (int(length) - 1) // 128)
            counts[pair] = counts.get(pair, 0) + 1
            seen.add(ADJACENT.findall(text)[0])
    assert counts == {(keys, segments): 30 for keys in (1, 2, 4) for segments in (2, 4)}
    assert len(seen) == 180  # no document is another one with more keys


def test_groups_do_not_depend_on_the_number_of_workers(tmp_path):
    stores = [prepare(data_config(tmp_path / str(n), keys=[1, 3]), workers=n) for n in (1, 2)]
    assert stores[0].fingerprint == stores[1].fingerprint


def test_store_of_one_number_of_keys_is_as_it_was(tmp_path):
    config = data_config(tmp_path, keys=2, form="sentence", queries=1, segment_length=256)
    store = prepare(config, workers=1)
    assert store.split("train").groups is None
    assert not list(store.path.glob("*.groups.npy"))
    assert {name for name in store.manifest["settings"] if "passkey" in name} == {
        f"data.passkey.{name}"
        for name in ("segment_length", "segments", "documents", "digits", "keys", "filler")
    } | {"data.passkey.text_files"}
    assert Store.open(config.store, config)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"form": "sentence"}, "data.passkey.form is 'sentence', but .* was made with 'adjacent'"),
        ({"queries": 1}, "data.passkey.queries is 1, but .* was made with 'all'"),
        ({"keys": [1, 3]}, r"data.passkey.keys is \[1, 3\], but .* was made with \[1, 2\]"),
    ],
)
def test_store_of_other_keys_is_refused(tmp_path, change, says):
    prepare(data_config(tmp_path, keys=[1, 2], segment_length=256), workers=1)
    config = data_config(tmp_path, **({"keys": [1, 2], "segment_length": 256} | change))
    with pytest.raises(UserError, match=f"^{says}"):
        Store.open(config.store, config)
