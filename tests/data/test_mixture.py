"""Two corpora, one of them with weights, in stores of their own and read as one."""

import json

import numpy as np
import pytest

from infini_ds.config import DataConfig, RunConfig
from infini_ds.data.lanes import Lanes
from infini_ds.data.mixture import Mixture
from infini_ds.data.opening import open_data
from infini_ds.data.prepare import prepare
from infini_ds.data.windows import read_windows, total_weight
from infini_ds.errors import UserError
from tests import tiny

SEGMENT = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"text number {i}. " * (1 + i % 5))
    turns = [[["ask ", 0.5], [f"answer {i} " * (1 + i % 7), 2.0]] for i in range(40)]
    lines = [json.dumps({"turns": turn}) for turn in turns]
    (folder / "chat.jsonl").write_text("\n".join(lines))
    for corpus in config_of(folder).data.corpora.values():
        prepare(corpus, workers=1)
    return folder


def config_of(folder, packing=True, **changes) -> RunConfig:
    mixture = {
        "text": {"source": "files", "files": [f"{folder}/*.txt"], "store": f"{folder}/text"},
        "chat": {
            "source": "files", "files": [f"{folder}/chat.jsonl"], "weighted_field": "turns",
            "store": f"{folder}/chat", "weight": 2.0,
        },
    }  # fmt: skip
    for name, settings in changes.items():
        mixture[name] |= settings
    for corpus in mixture.values():
        corpus.setdefault("held_out_fraction", 0.2)
    data = {"store": "", "tokenizer": {"kind": "bytes"}, "mixture": mixture, "packing": packing}
    return tiny.run_config(
        model={"segment_length": SEGMENT}, data=data, train={"batch_size": 4, "window_segments": 2}
    )


def test_documents_are_those_of_the_stores_one_after_another(folder):
    data = Mixture.open(config_of(folder).data)
    assert [*data.stores] == ["chat", "text"]
    for name in ("train", "held_out"):
        whole, document = data.split(name), 0
        for store in data.stores.values():
            own = store.split(name)
            for index, length in enumerate(own.lengths):
                tokens = whole.tokens(document, 0, length)
                assert tokens.tolist() == own.tokens(index, 0, length).tolist()
                document += 1
        assert document == len(whole.lengths)


def test_windows_hold_tokens_and_weights_of_both_stores(folder):
    data, lanes = open_data(config_of(folder))
    chat, text = (store.split("train") for store in data.stores.values())
    split, first = data.split("train"), len(chat.lengths)
    seen = set()
    for _ in range(40):
        plan = lanes.next_plan()
        windows = read_windows(split, plan, slice(None), SEGMENT)
        segments = windows.weights.view(4, 2, SEGMENT)
        for place in np.ndindex(4, 2):
            document, length = plan.documents[place], plan.lengths[place]
            if document >= first:
                assert segments[place][:length].tolist() == [1.0] * length
            own = text if document >= first else chat
            begin = plan.offsets[place]
            tokens = own.tokens(document - first * (document >= first), begin, begin + length)
            assert windows.tokens.view(4, 2, SEGMENT)[place][:length].tolist() == tokens.tolist()
            seen.add(bool(document >= first))
        assert total_weight(split, plan) == pytest.approx(float(windows.weights.sum()))
    assert seen == {True, False}


@pytest.mark.parametrize("packing", [False, True], ids=["alone", "packed"])
def test_lanes_read_tokens_in_proportion_to_the_weights(folder, packing, monkeypatch):
    monkeypatch.setattr("infini_ds.data.packing.BLOCK", 64)  # a few in what is read here
    data, lanes = open_data(config_of(folder, packing))
    assert isinstance(lanes, Lanes)
    first = len(data.stores["chat"].split("train").lengths)
    tokens = np.zeros(2)
    for _ in range(400):
        plan = lanes.next_plan()
        for own in (0, 1):
            tokens[own] += plan.lengths[(plan.documents >= first) == own].sum()
            if plan.guests is not None:
                tokens[own] += plan.guests.lengths[(plan.guests.documents >= first) == own].sum()
    assert tokens[0] / tokens[1] == pytest.approx(2, rel=0.02)
    passes = tokens / [(store.split("train").lengths - 1).sum() for store in data.stores.values()]
    assert lanes.corpus_epochs == pytest.approx(passes, rel=0.02)


@pytest.mark.parametrize("packing", [False, True], ids=["alone", "packed"])
def test_lanes_seek_and_go_on_as_they_step(folder, packing):
    config = config_of(folder, packing)
    (_, stepped), (_, sought) = open_data(config), open_data(config)
    assert isinstance(sought, Lanes)
    for step in range(60):
        sought.seek(step)
        state = json.loads(json.dumps(stepped.state()))
        _, resumed = open_data(config)
        resumed.load_state(state)
        plans = [lanes.next_plan() for lanes in (stepped, sought, resumed)]
        for plan in plans[1:]:
            assert all(np.array_equal(a, b) for a, b in zip(plan[:4], plans[0][:4], strict=True))
            guests = [each.guests or () for each in (plan, plans[0])]
            assert all(np.array_equal(a, b) for a, b in zip(*guests, strict=True))


def test_fingerprint_is_that_of_names_and_contents(folder):
    mixture = Mixture.open(config_of(folder).data)
    alone = DataConfig.model_validate(config_of(folder).data.corpora["text"].model_dump())
    assert Mixture.open(alone).fingerprint == mixture.stores["text"].fingerprint
    renamed = Mixture({"chat": mixture.stores["text"], "text": mixture.stores["chat"]}, [1, 1])
    others = {mixture.fingerprint, renamed.fingerprint, Mixture.open(alone).fingerprint}
    assert len(others) == 3


def test_bytes_per_token_is_of_what_is_trained_on(folder):
    data = Mixture.open(config_of(folder).data)
    ratios = [
        size["bytes"] / size["tokens"]
        for size in (store.manifest["splits"]["train"] for store in data.stores.values())
    ]
    assert data.bytes_per_token == pytest.approx((2 * ratios[0] + ratios[1]) / 3)


def test_place_of_documents_names_the_store_and_its_own_index(folder):
    data = Mixture.open(config_of(folder).data)
    first = len(data.stores["chat"].split("train").lengths)
    assert data.place_of([3, first, first + 2]) == (
        f"data.store {folder}/chat, in train documents 3; "
        f"data.store {folder}/text, in train documents 0, 2"
    )


def test_a_store_of_other_settings_is_refused(folder):
    config = config_of(folder, text={"held_out_fraction": 0.1})
    with pytest.raises(UserError, match=r"data\.held_out_fraction is 0\.1, but data\.store .*text"):
        open_data(config)
    assert Mixture.open(config.data, settings=False).split("train")
