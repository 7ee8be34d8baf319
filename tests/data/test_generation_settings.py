"""Where a text ends, as the files of its model say it."""

import json

import pytest

from infini_ds.data.generation_settings import GENERATION, read_generation
from infini_ds.data.sentencepiece_tokenizer import train_sentencepiece
from infini_ds.data.tokenizer import load_tokenizer
from infini_ds.errors import UserError
from tests.data.tokenizer_files import SOURCE, write_byte_level

# What generation_config.json and config.json say (None: there is no such file), the ends beside the
# tokenizer's own EOS, 401.
ENDS: dict[str, tuple] = {
    "no-files": (None, None, []),
    "no-ends": ({"temperature": 0.5}, {"vocab_size": 9}, []),
    "ends-that-are-null": ({"eos_token_id": None}, {"eos_token_id": None}, []),
    "a-list-in-both": ({"eos_token_id": [1, 2]}, {"eos_token_id": [1, 2]}, [1, 2]),
    "the-tokenizers-own-among-them": ({"eos_token_id": [3, 401, 2]}, None, [3, 2]),
    "one-in-both": ({"eos_token_id": 401}, {"eos_token_id": 401}, []),
    "another-one": ({"eos_token_id": 7}, {"eos_token_id": 401}, [7]),
    "a-list-in-config-alone": (None, {"eos_token_id": [401, 8]}, [8]),
    "generation-without-ends": ({"top_p": 0.9}, {"eos_token_id": [8]}, [8]),
    "generation-goes-first": ({"eos_token_id": [5]}, {"eos_token_id": [8, 9]}, [5]),
    "an-empty-list": ({"eos_token_id": []}, None, []),
    "id-0": ({"eos_token_id": 0}, None, [0]),
}


@pytest.mark.parametrize("case", ENDS)
def test_a_tokenizer_ends_at_eos_and_where_its_model_does(case, tmp_path):
    generation, config, more = ENDS[case]
    for name, tree in ((GENERATION, generation), ("config.json", config)):
        if tree is not None:
            (tmp_path / name).write_text(json.dumps(tree))
    tokenizer = load_tokenizer("tokenizers", write_byte_level(tmp_path))
    assert tokenizer.eos_ids == [401, *more]
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer("tokenizers", tmp_path / "saved" / "tokenizer.json")
    assert again.eos_ids == tokenizer.eos_ids
    assert again.fingerprint == tokenizer.fingerprint
    for name in ("temperature", "top_p"):
        assert again.generation.get(name) == (generation or {}).get(name)


def test_a_sentencepiece_model_has_its_ends_too(tmp_path):
    train_sentencepiece(iter([SOURCE]), 320, tmp_path / "tokenizer.model")
    (tmp_path / GENERATION).write_text('{"eos_token_id": [2, 9]}')
    tokenizer = load_tokenizer("sentencepiece", tmp_path / "tokenizer.model")
    assert tokenizer.eos_ids == [2, 9]
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer("sentencepiece", tmp_path / "saved" / "tokenizer.model").eos_ids == [2, 9]
    assert load_tokenizer("bytes").eos_ids == [257]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"eos_token_id": "</s>"}', r"eos_token_id must be ids of tokens, got \['</s>'\]"),
        ('{"eos_token_id": [2, -1]}', "must be ids"),
        ('{"eos_token_id": [true]}', "must be ids"),
        ("[]", "must be a mapping of settings"),
        ("{", "cannot be read"),
    ],
    ids=["a-token", "below-0", "a-truth", "a-list", "no-json"],
)
def test_what_cannot_be_read_is_one_line(text, message, tmp_path):
    (tmp_path / GENERATION).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_generation(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / GENERATION))
    assert "\n" not in str(caught.value)
