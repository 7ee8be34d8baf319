import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from infini_ds.config import DataConfig
from infini_ds.data.documents import Corpus
from infini_ds.errors import UserError

COMPRESS = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def corpus_of(*files, **settings):
    return Corpus(DataConfig(source="files", files=[str(f) for f in files], store="", **settings))


def texts(corpus):
    return [document.text for document in corpus]


@pytest.mark.parametrize("ending", COMPRESS)
def test_corpus_txt_is_one_document_with_its_line_ends(tmp_path, ending):
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(COMPRESS[ending]("one\r\ntwo é\n\n".encode()))
    (document,) = corpus_of(path)
    assert document[:3] == (str(path), "one\r\ntwo é\n\n", ())


@pytest.mark.parametrize("ending", COMPRESS)
def test_corpus_jsonl_is_one_document_a_record(tmp_path, ending):
    path = tmp_path / f"a.jsonl{ending}"
    lines = "\n".join(json.dumps({"id": i, "body": f"text\n{i}"}) for i in range(500))
    path.write_bytes(COMPRESS[ending](lines.encode()))
    corpus = corpus_of(path, text_field="body")
    assert texts(corpus) == [f"text\n{i}" for i in range(500)]
    assert corpus.done_bytes == corpus.total_bytes == path.stat().st_size


def test_corpus_parquet_is_one_document_a_row(tmp_path):
    table = pyarrow.table({"id": range(200), "text": [f"row {i}" for i in range(200)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert texts(corpus_of(tmp_path / "a.parquet")) == [f"row {i}" for i in range(200)]


def test_corpus_file_without_extension_is_one_document(tmp_path):
    (tmp_path / "enwik8").write_text("<page>\n</page>\n")
    assert texts(corpus_of(tmp_path / "enwik8")) == ["<page>\n</page>\n"]


def test_corpus_zst_reads_all_frames(tmp_path):
    compress = COMPRESS[".zst"]
    (tmp_path / "a.txt.zst").write_bytes(compress(b"one ") + compress(b"two"))
    assert texts(corpus_of(tmp_path / "a.txt.zst")) == ["one two"]


def test_corpus_globs_are_sorted_and_a_file_is_read_once(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(name)
    corpus = corpus_of(tmp_path / "c.txt", tmp_path / "*.txt")
    assert texts(corpus) == ["c", "a", "b"]
    assert texts(corpus) == ["c", "a", "b"]


def test_corpus_stops_after_max_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": "1"}\n{"text": "2"}\n{"text": "3"}\n')
    assert texts(corpus_of(tmp_path / "a.jsonl", max_documents=2)) == ["1", "2"]


def test_corpus_skips_and_counts_what_is_no_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "good"}\n'
        b'{"text": ""}\n'
        b"\n"
        b'{"text": "\xff"}\n'
        b'{"text": "half \\ud800 pair"}\n'
        b'{"text": \n'
        b'{"text": "x", "id": ' + b"9" * 5000 + b"}\n"
        b'{"text": null}\n'
        b'{"text": 3}\n'
        b'{"text": "last"}'
    )
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_bytes(b"")
    corpus = corpus_of(path, tmp_path / "*.txt")
    assert texts(corpus) == ["good", "last"]
    assert corpus.skipped.counts == {
        "empty": 2,
        "invalid UTF-8": 3,
        "invalid JSON": 2,
        "field is not text": 2,
    }
    assert corpus.skipped.lines()[0] == (
        f"3 skipped, invalid UTF-8: {path}:4, {path}:5, {tmp_path / 'latin.txt'} byte 3"
    )


def test_corpus_parquet_skips_a_row_of_invalid_utf8(tmp_path):
    column = pyarrow.array([b"good", b"\xff", None, b"last"], pyarrow.binary())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    corpus = corpus_of(tmp_path / "a.parquet")
    assert texts(corpus) == ["good", "last"]
    assert corpus.skipped.counts == {"invalid UTF-8": 1, "field is not text": 1}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", b"text", r"must be \.txt, \.jsonl"),
        ("a.jsonl", b'{"body": "x"}', r"a\.jsonl:1: has no data\.text_field 'text' .*body"),
        ("a.jsonl", b"[1]", r"a\.jsonl record 1: has no data\.text_field 'text' \(it is no object"),
        ("a.parquet", b"no parquet", r"a\.parquet: cannot be read"),
        ("a.txt.gz", gzip.compress(b"x" * 99)[:-9], r"a\.txt\.gz: cannot be read"),
        ("a.txt.gz", b"plain", r"a\.txt\.gz: cannot be read"),
        ("a.txt.zst", COMPRESS[".zst"](b"x" * 99)[:-3], r"a\.txt\.zst: cannot be read"),
        ("a.txt.zst", b"plain", r"a\.txt\.zst: cannot be read"),
    ],
    ids=["csv", "field", "list", "parquet", "cut_gz", "no_gz", "cut_zst", "no_zst"],
)
def test_corpus_refuses_a_file_it_cannot_read(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"^data\.files .*{says}") as caught:
        texts(corpus_of(tmp_path / name))
    assert "\n" not in str(caught.value)


PIECES = [["Is é a letter? ", 0], ["Yes.", 1.5]]
WEIGHTED = ("Is é a letter? Yes.", ((15, 0), (4, 1.5)))


def weighted(corpus):
    return [(document.text, document.spans) for document in corpus]


def test_corpus_jsonl_has_weighted_pieces(tmp_path):
    path = tmp_path / "a.jsonl"
    named = [{"text": text, "weight": weight} for text, weight in PIECES]
    records = [PIECES, named, "plain", [["", 1], ["x", 2], ["", 0]], [["x", 0], ["", 10**38]]]
    path.write_text("".join(json.dumps({"turns": record}) + "\n" for record in records))
    (tmp_path / "b.txt").write_text("file")
    corpus = corpus_of(path, tmp_path / "b.txt", weighted_field="turns")
    assert weighted(corpus) == [
        WEIGHTED,
        WEIGHTED,
        ("plain", ((5, 1),)),
        ("x", ((0, 1), (1, 2), (0, 0))),
        ("x", ((1, 0), (0, 10**38))),  # of the end of text
        ("file", ((4, 1),)),
    ]


def test_corpus_parquet_has_weighted_pieces(tmp_path):
    rows = [[{"text": text, "weight": weight} for text, weight in PIECES], None, []]
    pyarrow.parquet.write_table(pyarrow.table({"turns": rows}), tmp_path / "a.parquet")
    corpus = corpus_of(tmp_path / "a.parquet", weighted_field="turns")
    assert weighted(corpus) == [WEIGHTED]
    assert corpus.skipped.counts == {"field is not text or weighted pieces": 1, "empty": 1}


def test_corpus_dataset_has_weighted_pieces(tmp_path):
    rows = [[{"text": text, "weight": weight} for text, weight in PIECES]]
    datasets.Dataset.from_dict({"turns": rows}).save_to_disk(tmp_path / "saved")
    config = DataConfig(
        source="huggingface", dataset=str(tmp_path / "saved"), weighted_field="turns", store=""
    )
    assert weighted(Corpus(config)) == [WEIGHTED]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (3, "field is not text or weighted pieces"),
        (["x"], "field is not text or weighted pieces"),
        ([["x"]], "field is not text or weighted pieces"),
        ([[3, 1]], "field is not text or weighted pieces"),
        ([{"body": "x", "weight": 1}], "field is not text or weighted pieces"),
        ([["half \ud800 pair", 1]], "invalid UTF-8"),
        ([["x", "1"]], "weight is not a number of at least 0"),
        ([["x", True]], "weight is not a number of at least 0"),
        ([["x", -1]], "weight is not a number of at least 0"),
        ([["x", float("nan")]], "weight is not a number of at least 0"),
        ([["x", float("inf")]], "weight is not a number of at least 0"),
        pytest.param([["x", 10**400]], "weight is not a number of at least 0", id="huge integer"),
        pytest.param([["x", 1e39]], "weight is not a number of at least 0", id="beyond fp32"),
        ([{"text": "x"}], "weight is not a number of at least 0"),
        ([["x", 0], ["y", 0.0]], "all weights are 0"),
        ([["x", 1e-46]], "all weights are 0"),
        ([["", 1], ["x", 0]], "all weights are 0"),
        ([], "empty"),
        ([["", 1]], "empty"),
    ],
    ids=str,
)
def test_corpus_skips_pieces_that_are_not_weighted_text(tmp_path, record, reason):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"turns": record}) + "\n")
    corpus = corpus_of(path, weighted_field="turns")
    assert texts(corpus) == []
    assert corpus.skipped.counts == {reason: 1}


@pytest.mark.parametrize("column", ["body", "turns"], ids=["missing", "texts"])
def test_corpus_refuses_parquet_without_weighted_pieces(tmp_path, column):
    pyarrow.parquet.write_table(pyarrow.table({column: ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: .*data\.weighted_field 'turns'"):
        texts(corpus_of(tmp_path / "a.parquet", weighted_field="turns"))


@pytest.mark.parametrize("column", ["body", "text"], ids=["missing", "numbers"])
def test_corpus_refuses_parquet_without_a_text_column(tmp_path, column):
    pyarrow.parquet.write_table(pyarrow.table({column: [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: .*data\.text_field 'text'"):
        texts(corpus_of(tmp_path / "a.parquet"))


def test_corpus_names_the_fields_there_are_in_one_line(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"bo\ndy": "x", "id": 1}) + "\n")
    with pytest.raises(
        UserError, match=r"has no data\.text_field 'text' \(its fields are bo dy, id"
    ):
        texts(corpus_of(tmp_path / "a.jsonl"))


def test_corpus_reads_a_file_of_several_names_once(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.txt").write_text("text")
    (tmp_path / "b.txt").symlink_to(tmp_path / "a" / "1.txt")
    names = ("a/1.txt", "a/../a/1.txt", "a//1.txt", "b.txt")
    assert texts(corpus_of(*(f"{tmp_path}/{name}" for name in names))) == ["text"]


def test_corpus_that_cannot_be_read_has_no_snapshot(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    corpus = corpus_of(tmp_path / "a.txt")
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match=r"^data\.files .*a\.txt: cannot be read"):
        _ = corpus.snapshot


@pytest.mark.parametrize("pattern", ["none.txt", "*.jsonl", "."], ids=["file", "glob", "directory"])
def test_corpus_refuses_files_that_match_nothing(tmp_path, pattern):
    with pytest.raises(UserError, match=r"^data\.files .*(no such file|is a directory)"):
        corpus_of(tmp_path / pattern)


def test_corpus_python_stdlib_has_sources_and_help_topics():
    corpus = Corpus(DataConfig(store=""))
    names = [document.name for document in corpus]
    assert "json/decoder.py" in names
    assert "help topic lambda" in names
    assert not [name for name in names if "site-packages" in name]
    assert len(names) == len(set(names)) > 500
    assert corpus.done_bytes == corpus.total_bytes


@pytest.mark.parametrize("streaming", [True, False], ids=["streamed", "downloaded"])
def test_corpus_reads_a_local_dataset_directory(tmp_path, monkeypatch, streaming):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "one"}\n{"text": ""}\n{"text": "two"}\n')
    config = DataConfig(source="huggingface", dataset=str(folder), streaming=streaming, store="")
    corpus = Corpus(config)
    assert texts(corpus) == ["one", "two"]
    assert corpus.skipped.counts == {"empty": 1}


def test_corpus_reads_a_dataset_saved_to_disk(tmp_path):
    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(tmp_path / "saved")
    config = DataConfig(source="huggingface", dataset=str(tmp_path / "saved"), store="")
    assert texts(Corpus(config)) == ["one", "two"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"text_field": "body"}, r"has no data\.text_field 'body' .*text"),
        ({"dataset_split": "test"}, "test"),
    ],
    ids=["field", "split"],
)
def test_corpus_refuses_a_dataset_without_what_is_named(tmp_path, monkeypatch, settings, says):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n')
    config = DataConfig(source="huggingface", dataset=str(tmp_path), store="", **settings)
    with pytest.raises(UserError, match=rf"^data\.dataset\w* .*{says}") as caught:
        texts(Corpus(config))
    assert "\n" not in str(caught.value)


def test_corpus_refuses_a_dataset_that_is_not_there(tmp_path):
    config = DataConfig(source="huggingface", dataset=str(tmp_path / "none"), store="")
    with pytest.raises(UserError, match=r"^data\.dataset .*none"):
        texts(Corpus(config))


def test_corpus_splits_a_text_file_at_the_document_separator(tmp_path):
    path = tmp_path / "pages.txt"
    path.write_text("head<page>one<page>two")
    config = DataConfig(
        source="files", files=[str(path)], document_separator="<page>", store=str(tmp_path / "s")
    )
    assert [document.text for document in Corpus(config)] == ["head", "<page>one", "<page>two"]
