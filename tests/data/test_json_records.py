"""Records of JSON in all the forms people have them, and fields inside others."""

import gzip
import io
import json
import re
from itertools import islice

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from infini_ds.config import DataConfig
from infini_ds.data.documents import Corpus
from infini_ds.data.json_records import json_records
from infini_ds.errors import UserError

TEXTS = [
    'plain "quoted" \\ {"text": 1}, [x]',
    "é 漢 🎉 \u2028\u2029\x85\x0c\0",
    "\n\r\t ",
    "x" * 200_000,
]
RECORDS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]


def lines(ends="\n", **options):
    return ends.join(json.dumps(record, **options) for record in RECORDS)


FORMS = {
    "lines": lines(),
    "lines_raw": lines(ensure_ascii=False),
    "lines_crlf": lines("\r\n"),
    "lines_cr": lines("\r"),
    "lines_blank": "\n \n\n" + lines("\n\n\t\n") + "\n\n",
    "lines_of_concatenated_files": lines("\n\ufeff"),
    "lines_with_form_feeds": lines("\x0c\n"),
    "array": json.dumps(RECORDS),
    "array_raw": json.dumps(RECORDS, ensure_ascii=False),
    "array_indented": json.dumps(RECORDS, indent=4),
    "array_of_lines": "[\n" + lines(",\n") + "\n]\n",
    "array_dense": " \n" + json.dumps(RECORDS, separators=(",", ":")),
    "array_crlf": "[\r\n" + lines(" ,\r\n") + "\r\n]",
    "indented": lines(indent=2),
    "indented_compactly": "".join(json.dumps(record, indent=0) for record in RECORDS),
}
COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def corpus_of(path, **settings):
    return Corpus(DataConfig(source="files", files=[str(path)], store="", **settings))


def texts(corpus):
    return [document.text for document in corpus]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".NDJSON"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_same_texts(tmp_path, form, suffix):
    (tmp_path / f"a{suffix}").write_bytes(FORMS[form].encode())
    corpus = corpus_of(tmp_path / f"a{suffix}")
    assert texts(corpus) == TEXTS
    assert corpus.skipped.counts == {}


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".ndjson", ".JSON", ".Jsonl"])
def test_every_name_is_known(tmp_path, suffix, ending):
    for name in (ending, ending.upper()):
        path = tmp_path / f"a.b{suffix}{name}"
        path.write_bytes(COMPRESS[ending](FORMS["lines"].encode()))
        assert texts(corpus_of(path)) == TEXTS


def test_one_object_is_one_record(tmp_path):
    for content in ('{"text": "one"}', '{\n "text":\n "one"\n}\n', '[{"text": "one"}]'):
        (tmp_path / "a.json").write_text(content)
        assert texts(corpus_of(tmp_path / "a.json")) == ["one"]


class _Endless(io.RawIOBase):
    """An array that never ends."""

    def __init__(self):
        self.read_bytes = 0
        self._rest = b"["

    def readable(self):
        return True

    def readinto(self, buffer):
        while len(self._rest) < len(buffer):
            self._rest += b'{"text": "some words"},\n' * 4000
        buffer[:], self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        self.read_bytes += len(buffer)
        return len(buffer)


def test_an_array_is_read_as_a_stream():
    endless = _Endless()
    records = json_records(io.BufferedReader(endless), lambda *_: None)
    *_, last = islice(records, 5000)
    assert last == (" record 5000", {"text": "some words"})
    assert endless.read_bytes < 1 << 18


BROKEN = {
    "no_end": ('[{"text": "a"}', "line 1: no valid JSON (the array has no end)"),
    "cut": ('[{"text": "a"}, {"text": "b', "line 1: no valid JSON (Unterminated string"),
    "cut_in_a_name": ('[{"text": "a"},\n {"te', "line 2: no valid JSON"),
    "no_comma": ('[{"text": "a"}\n{"text": "b"}]', "line 2: no valid JSON (expecting a comma"),
    "comma_at_the_end": ('[{"text": "a"},]', "line 1: no valid JSON (Expecting value)"),
    "after_the_end": (
        '[{"text": "a"}]\n{"text": "b"}',
        "line 2: no valid JSON (there is something",
    ),
    "single_quotes": ("[{'text': 'a'}]", "line 1: no valid JSON (Expecting property name"),
    "constants": ('[{"text": undefined}]', "line 1: no valid JSON (Expecting value)"),
    "digits": ('[{"text": "a", "n": ' + "9" * 5000 + "}]", "line 1: no valid JSON (Exceeds the"),
    "deep": ("[" * 100_000, "line 1: no valid JSON (maximum recursion"),
    "indented_and_cut": ('{\n "text": "a",\n "b": \n', "line 4: no valid JSON"),
    "late": ("[" + '{"text": "a"},\n' * 5000 + "{x}]", "line 5,001: no valid JSON"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_json_of_one_piece_that_is_broken_is_told(tmp_path, name):
    content, says = BROKEN[name]
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=re.escape(says)) as raised:
        texts(corpus_of(tmp_path / "a.json"))
    assert str(raised.value).startswith(f"data.files {tmp_path / 'a.json'}: line ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("form", ["lines", "array"])
def test_what_is_no_text_is_counted(tmp_path, form):
    records = [
        b'{"text": "good"}', b'{"text": null}', b'{"text": 3}', b'{"text": ["a"]}',
        b'{"text": {"a": "b"}}', b'{"text": true}', b'{"text": ""}', b'{"text": "half \\ud800"}',
        b'{"text": "caf\xe9"}', b'{"text": "last"}',
    ]  # fmt: skip
    path = tmp_path / "a.json"
    path.write_bytes(b"\n".join(records) if form == "lines" else b"[%s]" % b",\n".join(records))
    corpus = corpus_of(path)
    assert texts(corpus) == ["good", "last"]
    assert corpus.skipped.counts == {"field is not text": 5, "empty": 1, "invalid UTF-8": 2}
    second = ":2" if form == "lines" else " record 2"
    assert f"5 skipped, field is not text: {path}{second}, " in corpus.skipped.lines()[0]


NO_RECORDS = {
    "string": ('"text"', ":1: has no data.text_field 'text' (it is no object with fields)"),
    "number": ("3", ":1: has no data.text_field 'text' (it is no object with fields)"),
    "null": ('\n{"text": "a"}\nnull', ":3: has no data.text_field 'text' (it is no object"),
    "strings": ('["a", "b"]', " record 1: has no data.text_field 'text' (it is no object"),
    "arrays": ('[{"text": "a"}, []]', " record 2: has no data.text_field 'text' (it is no object"),
    "other": ('{"body": "a", "meta": {"id": 1}}', "'text' (its fields are body, meta.id)"),
    "empty_object": ("{}", "'text' (its fields are )"),
    "many": (json.dumps(dict.fromkeys(map(str, range(99)))), "18, 19, ...)"),
}


@pytest.mark.parametrize("name", NO_RECORDS)
def test_a_record_without_the_field_is_told(tmp_path, name):
    content, says = NO_RECORDS[name]
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=re.escape(says)):
        texts(corpus_of(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"[]", b"[ \n ]", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_file_without_records_is_counted(tmp_path, suffix, content):
    (tmp_path / f"a{suffix}").write_bytes(content)
    corpus = corpus_of(tmp_path / f"a{suffix}")
    assert texts(corpus) == []
    assert corpus.skipped.lines() == [f"1 skipped, empty: {tmp_path / f'a{suffix}'}"]


FIELDS = {
    "flat": ("text", {"text": "a"}),
    "inside": ("meta.text", {"meta": {"text": "a", "id": 1}}),
    "two_inside": ("a.b.c", {"a": {"b": {"c": "a"}}}),
    "flat_of_that_name": ("meta.text", {"meta.text": "a", "meta": {"text": "b"}}),
    "flat_alone_of_that_name": ("meta.text", {"meta.text": "a"}),
    "dot_inside": ("a.b.c", {"a": {"b.c": "a"}}),
    "flat_before_dot_inside": ("a.b.c", {"a": {"b.c": "a", "b": {"c": "b"}}}),
    "beside_one_that_begins_so": ("text", {"text_id": "b", "text": "a"}),
    "beside_a_struct_of_that_name": ("meta.text", {"text": "b", "meta": {"text": "a"}}),
    "one_letter": ("x.y", {"x": {"y": "a"}}),
    "unicode": ("über.größe", {"über": {"größe": "a"}}),
}


def as_jsonl(folder, rows):
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return corpus_of(folder / "a.jsonl")._config


def as_parquet(folder, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
    return corpus_of(folder / "a.parquet")._config


def as_dataset(folder, rows):
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    return DataConfig(source="huggingface", dataset=str(folder / "saved"), store="")


SOURCES = {"jsonl": as_jsonl, "parquet": as_parquet, "dataset": as_dataset}


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("source", SOURCES)
def test_a_field_may_be_inside_another(tmp_path, source, name):
    field, record = FIELDS[name]
    rows = [record, record]
    if name == "inside":
        rows.append({"meta": None})
    config = SOURCES[source](tmp_path, rows)
    corpus = Corpus(config.model_copy(update={"text_field": field}))
    assert texts(corpus) == ["a", "a"]
    assert corpus.skipped.counts == ({"field is not text": 1} if name == "inside" else {})


@pytest.mark.parametrize("source", SOURCES)
def test_a_field_inside_another_that_is_missing_is_told(tmp_path, source):
    config = SOURCES[source](tmp_path, [{"meta": {"id": 1}, "body": "a"}])
    says = r"has no data\.text_field 'meta\.text' \(its fields are meta\.id, body\)"
    with pytest.raises(UserError, match=says):
        texts(Corpus(config.model_copy(update={"text_field": "meta.text"})))


def test_weighted_pieces_may_be_inside_another(tmp_path):
    pieces = [{"text": "a", "weight": 0.0}, {"text": "b", "weight": 2.0}]
    for source in SOURCES:
        (tmp_path / source).mkdir()
        config = SOURCES[source](tmp_path / source, [{"chat": {"turns": pieces}}])
        corpus = Corpus(config.model_copy(update={"weighted_field": "chat.turns"}))
        assert [(d.text, d.spans) for d in corpus] == [("ab", ((1, 0.0), (1, 2.0)))]


def test_a_column_of_records_is_no_text(tmp_path):
    config = as_parquet(tmp_path, [{"meta": {"id": 1}}])
    with pytest.raises(UserError, match=r"text in data\.text_field 'meta' \(its fields are id\)"):
        texts(Corpus(config.model_copy(update={"text_field": "meta"})))
