import json
import shutil

import numpy as np
import pytest

from infini_ds.config import DataConfig, TokenizerConfig
from infini_ds.data import store as store_module
from infini_ds.data.prepare import prepare
from infini_ds.data.store import Store
from infini_ds.errors import UserError
from tests.damage import cut, flip

TEXTS = ["abc", "aab", "b" * 50, "a c", "caba", "bca"]


def config_of(folder, **settings):
    config = DataConfig(
        source="files",
        files=[str(folder / "*.txt")],
        store="",
        tokenizer=TokenizerConfig(kind="bytes"),
        held_out_fraction=0.5,
    )
    return config.model_copy(update=settings)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    for i, text in enumerate(TEXTS):
        (folder / f"{i}.txt").write_text(text)
    config = config_of(folder, store=str(folder / "store"))
    prepare(config, workers=1)
    return folder


@pytest.fixture
def path(prepared, tmp_path):
    """A copy of the store that a test may damage."""
    return shutil.copytree(prepared / "store", tmp_path / "store")


def test_store_open_gives_lengths_offsets_and_tokens(path, prepared):
    store = Store.open(path, config_of(prepared))
    train, held_out = store.split("train"), store.split("held_out")
    assert len(train.lengths) + len(held_out.lengths) == len(TEXTS)
    assert len(train.lengths) * len(held_out.lengths) > 0
    lengths = sorted([*train.lengths.tolist(), *held_out.lengths.tolist()])
    assert lengths == sorted(len(text) + 2 for text in TEXTS)
    for split in (train, held_out):
        assert split.lengths.dtype == split.offsets.dtype == np.int64
        assert split.offsets[-1] == len(split.data)
        for d, length in enumerate(split.lengths):
            whole = split.tokens(d, 0, int(length)).tolist()
            assert (whole[0], whole[-1]) == (256, 257)
            assert split.tokens(d, 1, 3).tolist() == whole[1:3]
            assert split.tokens(d, 0, 10**9).tolist() == whole
            assert split.tokens(d, 10**9, 10**9 + 5).tolist() == []


def test_store_fingerprint_is_of_content_not_of_place(path, prepared):
    assert Store.open(path).fingerprint == Store.open(prepared / "store").fingerprint


def test_unigram_bits_per_byte_matches_a_count_by_hand(path):
    store = Store.open(path)
    train = store.split("train").data.tolist()
    total = sum(token != 256 for token in train)
    bits = text_bytes = 0.0
    for token in store.split("held_out").data.tolist():
        if token != 256:
            bits -= np.log2((train.count(token) + 1) / (total + 258))
            text_bytes += token < 256
    assert store.unigram_bits_per_byte() == pytest.approx(bits / text_bytes, rel=1e-12)


def test_unknown_token_of_a_large_file_is_told_with_its_document(path, monkeypatch):
    monkeypatch.setattr(store_module, "_CHECKED_ON_OPEN", 0)
    monkeypatch.setattr(store_module, "_COUNTED_AT_ONCE", 4)
    split = Store.open(path).split("held_out")
    documents = len(split.lengths)
    Store.open(path).check_tokens("held_out", documents)
    tokens = np.memmap(path / "held_out.tokens", split.data.dtype, mode="r+")
    tokens[split.offsets[documents - 1]] = 258
    tokens.flush()
    Store.open(path).check_tokens("held_out", documents - 1)
    told = rf"held_out\.tokens: document {documents - 1} holds tokens that its tokenizer does not"
    with pytest.raises(UserError, match=told):
        Store.open(path).check_tokens("held_out", documents)


def test_unigram_bits_per_byte_refuses_a_store_without_held_out_text(prepared, tmp_path):
    config = config_of(prepared, held_out_fraction=0.0, store=str(tmp_path / "store"))
    store = prepare(config, workers=1)
    with pytest.raises(UserError, match=r"data\.held_out_fraction"):
        store.unigram_bits_per_byte()


def break_manifest(path, **change):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | change))


DAMAGE = {
    "missing": (lambda path: shutil.rmtree(path), "not found; run `infini-ds prepare CONFIG`"),
    "no_manifest": (lambda path: (path / "manifest.json").unlink(), "not a finished store"),
    "half_manifest": (
        lambda path: (path / "manifest.json").write_text('{"format": 1,'),
        "not a finished store",
    ),
    "other_format": (lambda path: break_manifest(path, format=99), "not of format 1"),
    **{
        f"entry_{name}": (
            lambda path, change=change: break_manifest(path, **change),
            "not a finished",
        )
        for name, change in {
            "no_files": {"files": {}},
            "file_of_no_size": {"files": {"train.tokens": {}}},
            "files": {"files": None},
            "settings": {"settings": []},
            "tokenizer": {"tokenizer": {}},
            "kind": {"tokenizer": {"kind": "words"}},
            "kind_of_a_list": {"tokenizer": {"kind": []}},
            "source": {"source": None},
            "splits": {"splits": {"train": {}}},
        }.items()
    },
    "byte_in_tokens": (lambda path: flip(path / "train.tokens"), r"train\.tokens: is damaged"),
    "byte_in_offsets": (
        lambda path: flip(path / "held_out.offsets.npy"),
        r"held_out\.offsets\.npy: is damaged",
    ),
    "truncated": (
        lambda path: cut(path / "train.tokens", 2),
        r"train\.tokens: has \d+ bytes, should have",
    ),
    "file_missing": (
        lambda path: (path / "train.counts.npy").unlink(),
        r"train\.counts\.npy: is missing",
    ),
}


@pytest.mark.parametrize(("damage", "says"), DAMAGE.values(), ids=DAMAGE.keys())
def test_store_open_refuses_a_damaged_store(path, damage, says):
    damage(path)
    with pytest.raises(UserError, match=rf"^data\.store .*{says}") as caught:
        Store.open(path)
    assert "\n" not in str(caught.value)


def test_store_open_names_a_file_that_cannot_be_read(path, monkeypatch):
    def denied(file):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(store_module, "sha256_of", denied)
    with pytest.raises(UserError, match=r"^data\.store .*store/\S+: cannot be read \(Permission"):
        Store.open(path)


def test_verify_finds_damage_that_open_does_not_look_for(path, monkeypatch):
    flip(path / "train.tokens")
    monkeypatch.setattr(store_module, "_CHECKED_ON_OPEN", 0)
    store = Store.open(path)
    with pytest.raises(UserError, match=r"train\.tokens: is damaged"):
        store.verify()


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        ({"tokenizer": TokenizerConfig()}, "data.tokenizer.kind"),
        ({"files": ["other.txt"]}, "data.files"),
        ({"source": "python-stdlib"}, "data.source"),
        ({"max_documents": 3}, "data.max_documents"),
        ({"held_out_fraction": 0.25}, "data.held_out_fraction"),
        ({"text_field": "body"}, "data.text_field"),
        ({"weighted_field": "turns"}, "data.weighted_field"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_store_open_refuses_a_store_of_other_settings(path, prepared, change, setting):
    config = config_of(prepared, **change)
    with pytest.raises(UserError, match=rf"^{setting} is .* made with .*--force") as caught:
        Store.open(path, config)
    assert "\n" not in str(caught.value)


def test_store_open_ignores_settings_that_do_not_change_it(path, prepared):
    Store.open(path, config_of(prepared, streaming=False, dataset="unused"))
    kind_only = TokenizerConfig(kind="bytes", vocab_size=9999, training_bytes=5)
    Store.open(path, config_of(prepared, tokenizer=kind_only))
