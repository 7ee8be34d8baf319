"""What is written like a special token, a byte token or a space mark is text, in every kind."""

import io
import json

import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from infini_ds.data.documents import Span
from infini_ds.data.encoding import encode
from infini_ds.data.tokenizer import load_tokenizer
from infini_ds.errors import UserError
from tests.data.tokenizer_files import SOURCE, byte_level, sentencepiece_like

SPECIAL = ["<unk>", "<s>", "</s>", "[CLS]", "[SEP]", "<|endoftext|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = sorted({*"defunctio_(),:> retr[]|<0xsABCEFLSPu/k129", "▁"})
MARKS = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


def unigram(byte_fallback=True) -> Tokenizer:
    pieces = [*SPECIAL, *(BYTES if byte_fallback else []), *LETTERS, "def▁", "\n"]
    scored = [(piece, -1.0 if piece in SPECIAL + BYTES else -5.0) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=byte_fallback))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = MARKS if byte_fallback else decoders.Metaspace(prepend_scheme="never")
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def bpe(ignore_merges=False, merges=(), byte_tokens_special=False) -> Tokenizer:
    pieces = [*SPECIAL, *BYTES, *LETTERS, *(a + b for a, b in merges if a + b not in SPECIAL)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    options = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    model = models.BPE(vocabulary, list(merges), ignore_merges=ignore_merges, **options)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = MARKS
    tokenizer.add_special_tokens([*SPECIAL, *(BYTES if byte_tokens_special else [])])
    return tokenizer


def of_words(kind) -> Tokenizer:
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, "def", "f", *LETTERS])}
    tokenizer = Tokenizer(kind(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def ends_not_special() -> Tokenizer:
    """As a model has them where somebody added them as any other token."""
    tokenizer = byte_level()
    ends = [AddedToken(end, special=False, normalized=False) for end in ("<s>", "</s>")]
    tokenizer.add_tokens(ends)
    return tokenizer


def sentencepiece_model(**options) -> bytes:
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SOURCE.split("\n")), model_writer=file, vocab_size=340,
        hard_vocab_limit=False, byte_fallback=True, remove_extra_whitespaces=False,
        normalization_rule_name="identity", minloglevel=3, **options,
    )  # fmt: skip
    return file.getvalue()


MERGES = [("<", "s"), ("<s", ">"), ("<", "/"), ("</", "s"), ("</s", ">"), ("d", "e")]
LOSSLESS = {
    "byte_level": byte_level,
    "spaces_before": sentencepiece_like,
    "unigram": unigram,
    "bpe": bpe,
    "bpe_whole_words": lambda: bpe(ignore_merges=True),
    "bpe_merged": lambda: bpe(merges=MERGES),
    "byte_tokens_special": lambda: bpe(byte_tokens_special=True),
    "whole_words_byte_tokens_special": lambda: bpe(True, byte_tokens_special=True),
    "ends_not_special": ends_not_special,
    "model_bpe": lambda: sentencepiece_model(model_type="bpe", add_dummy_prefix=False),
    "model_unigram": lambda: sentencepiece_model(add_dummy_prefix=False),
    "model_space_before": sentencepiece_model,
    "model_with_symbols": lambda: sentencepiece_model(
        user_defined_symbols=["<sep>", "[CLS]"], control_symbols=["<|endoftext|>", "<cls>"]
    ),
}
LOSING = {
    "unigram_without_bytes": lambda: unigram(byte_fallback=False),
    "words": lambda: of_words(models.WordLevel),
    "word_pieces": lambda: of_words(models.WordPiece),
}
TEXTS = {
    "bos": "<s>",
    "eos": "def f </s> def",
    "unknown": "a <unk> b",
    "cls": "[CLS] def [SEP]",
    "end_of_text": "def\n<|endoftext|>\ndef",
    "many": "<s><s></s></s><unk><s>",
    "inside": "<<s>> </s></s",
    "byte": "<0x0A> <0x41><0xE2><0x96><0x81>",
    "lower_byte": "<0x0a> <0x4> <0x041>",
    "mark": "▁def▁ ▁▁f▁",
    "noncharacters": "\ufdd0▁\ufdd1 \ufdef",
    "control_symbols": "<sep> <cls> <pad>",
    "begin": "<|begin|>def<|end|><|turn|>",
    "all_bytes": "naïve 漢字\n\t\r\0 é🎉",
}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """The tokenizer of a name, made once."""
    known = {}

    def made(name):
        if name not in known:
            known[name] = _load(tmp_path_factory.mktemp(name), (LOSSLESS | LOSING)[name]())
        return known[name]

    return made


def _load(folder, content):
    if isinstance(content, bytes):
        (folder / "a.model").write_bytes(content)
        return load_tokenizer("sentencepiece", folder / "a.model")
    content.save(str(folder / "tokenizer.json"))
    bos, eos = ("<s>", "</s>") if content.token_to_id("<s>") else ("<|begin|>", "<|end|>")
    settings = {"bos_token": bos, "eos_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer("tokenizers", folder / "tokenizer.json")


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
@pytest.mark.parametrize("name", LOSSLESS)
def test_text_comes_back_as_it_was(load, name, text):
    tokenizer = load(name)
    ids = tokenizer.encode(text)
    before = " " if tokenizer.decode(tokenizer.encode("d")) == " d" else ""
    assert tokenizer.decode(ids) == before + text
    assert tokenizer.bytes_of(tokenizer.encode_array(text)).decode() == before + text
    assert tokenizer.token_bytes[ids].sum() == len((before + text).encode())
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)


@pytest.mark.parametrize("name", LOSSLESS)
def test_no_space_is_put_into_a_text_that_comes_in_parts(load, name):
    tokenizer = load(name)
    parts = [tokenizer.encode_array("def▁"), *(tokenizer.encode_array(t, False) for t in "▁a🎉\n")]
    before = " " if tokenizer.decode(tokenizer.encode("d")) == " d" else ""
    assert "".join(map(tokenizer.decode, parts)) == before + "def▁▁a🎉\n"
    spans = (Span(0, 1.0), Span(3, 0.0), Span(5, 1.0))
    encoded = encode(tokenizer, "def def ", spans)
    assert tokenizer.decode(encoded.tokens) == before + "def def "


@pytest.mark.parametrize("name", LOSSLESS)
def test_no_space_is_put_into_a_long_text(load, name, monkeypatch):
    for module in ("tokenizer_base", "tokenizer_json"):
        monkeypatch.setattr(f"infini_ds.data.{module}.PIECE_CHARACTERS", 100)
    tokenizer = load(name)
    text = "def function(x):\n    return x▁\n" * 30
    assert len(list(tokenizer._pieces(text))) > 3
    before = " " if tokenizer.decode(tokenizer.encode("d")) == " d" else ""
    assert tokenizer.decode(tokenizer.encode(text)) == before + text


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
@pytest.mark.parametrize("name", LOSING)
def test_text_is_no_special_token_where_much_is_unknown(load, name, text):
    tokenizer = load(name)
    unknown = 0
    assert not set(tokenizer.encode(text)) & set(range(len(SPECIAL))) - {unknown}


def test_a_special_token_in_full_is_its_characters(load):
    tokenizer = load("unigram")
    assert tokenizer.encode("<s>") == [tokenizer.encode(letter)[0] for letter in "<s>"]


@pytest.mark.parametrize("name", ["byte_tokens_special", "whole_words_byte_tokens_special"])
def test_byte_tokens_that_are_special_stand_for_bytes(load, name):
    tokenizer = load(name)
    first = len(SPECIAL)
    assert tokenizer.table[first : first + 256] == [bytes([byte]) for byte in range(256)]
    assert tokenizer.encode("\n") == [first + 10]


def test_a_single_character_that_is_special_is_text(tmp_path):
    tokenizer = bpe()
    tokenizer.add_special_tokens(["d", ">"])
    loaded = _load(tmp_path, tokenizer)
    assert loaded.decode(loaded.encode("def>")) == "def>"


def test_a_file_of_an_older_form_is_read(tmp_path):
    tree = json.loads(bpe(merges=MERGES).to_str())
    tree["model"]["merges"] = [" ".join(pair) for pair in tree["model"]["merges"]]
    for name in ("type", "ignore_merges", "dropout"):
        del tree["model"][name]
    for name in ("padding", "truncation", "post_processor", "pre_tokenizer"):
        del tree[name]
    _load(tmp_path, bpe())
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    loaded = load_tokenizer("tokenizers", tmp_path / "tokenizer.json")
    assert loaded.decode(loaded.encode("<s> def")) == "<s> def"
    assert not {loaded.bos_id, loaded.eos_id} & set(loaded.encode("<s> </s>"))


def test_other_text_has_the_ids_of_the_library(load):
    text = "def function(x):\n    return x\n" * 20
    for name in ("unigram", "bpe_whole_words", "words", "word_pieces", "unigram_without_bytes"):
        theirs = (LOSSLESS | LOSING)[name]().encode(text, add_special_tokens=False).ids
        assert load(name).encode(text) == theirs


def test_an_end_that_any_text_may_have_is_refused(tmp_path):
    content = bpe()
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "d", "eos_token": "</s>"}')
    content.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"a text with 'd' would have BOS or EOS inside"):
        load_tokenizer("tokenizers", tmp_path / "tokenizer.json")
