import itertools

import pytest

from infini_ds.config import DataConfig, TokenizerConfig
from infini_ds.data.documents import Corpus, Document
from infini_ds.data.tokenizer import load_tokenizer
from infini_ds.data.train_tokenizer import main, sample_text, train_tokenizer

SOURCE = "".join(f"def function_{i}(x):\n    return x + {i}\n" for i in range(500))


def numbered(count):
    """Documents of one block each, whose text says which it is."""
    return [Document(str(i), f"{i:06d}" + "x" * 2000) for i in range(count)]


def test_sample_text_takes_everything_below_the_budget():
    documents = [Document("a", "é" * 5000), Document("b", "short")]
    assert "".join(sample_text(documents, 20_000)) == "é" * 5000 + "short"


@pytest.mark.parametrize("count", [10, 1000, 5000])
def test_sample_text_spreads_over_the_corpus_within_the_budget(count):
    budget = 100 * 2006
    numbers = [int(text[:6]) for text in sample_text(iter(numbered(count)), budget)]
    assert min(count, 50) <= len(numbers) <= 100
    distances = {after - before for before, after in itertools.pairwise(numbers)}
    assert len(distances) == 1
    assert numbers[0] == 0
    assert numbers[-1] + distances.pop() >= count


def test_sample_text_stops_at_the_read_limit():
    read = []
    documents = (read.append(document) or document for document in numbered(1000))
    sample_text(documents, 10_000, read_limit=100_000)
    assert len(read) == 49  # blocks of 2048 characters


def test_train_tokenizer_on_a_corpus_is_deterministic(tmp_path):
    (tmp_path / "a.txt").write_text(SOURCE)
    tokenizer = TokenizerConfig(vocab_size=400, training_bytes=5000)
    config = DataConfig(
        source="files", files=[str(tmp_path / "*.txt")], store="", tokenizer=tokenizer
    )
    for name in ("one.model", "two.model"):
        train_tokenizer(Corpus(config), config, tmp_path / name)
    assert (tmp_path / "one.model").read_bytes() == (tmp_path / "two.model").read_bytes()
    assert load_tokenizer("sentencepiece", tmp_path / "one.model").vocab_size == 400


def test_main_trains_a_model_on_the_files_named(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(SOURCE)
    model = tmp_path / "models" / "mine.model"
    assert main([str(model), "400", str(tmp_path / "a.txt")]) == 0
    tokenizer = load_tokenizer("sentencepiece", model)
    assert tokenizer.vocab_size == 400
    assert tokenizer.fingerprint[:16] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("vocab_size", "file", "says"),
    [
        ("100", "a.txt", "error: vocab_size (100) must be from 320"),
        ("400", "b.txt", "no such file"),
        ("9999", "a.txt", "at most"),
    ],
    ids=["vocabulary", "file", "corpus_too_small"],
)
def test_main_reports_a_mistake_in_one_line(tmp_path, capsys, vocab_size, file, says):
    (tmp_path / "a.txt").write_text(SOURCE)
    assert main([str(tmp_path / "m.model"), vocab_size, str(tmp_path / file)]) == 2
    message = capsys.readouterr().err
    assert says in message
    assert message.count("\n") == 1
    assert "pydantic" not in message
