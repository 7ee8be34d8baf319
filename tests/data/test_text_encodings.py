"""Files of any Unicode encoding that says so give their text; others are refused by name."""

import codecs
import gzip
import io
import json
import os
import threading

import pytest
import zstandard

from infini_ds.config import DataConfig
from infini_ds.data import text_files
from infini_ds.data.documents import Corpus
from infini_ds.data.prepare import prepare
from infini_ds.data.text_encoding import Utf8, WrongEncoding, read_text
from infini_ds.data.text_pieces import TextPieces
from infini_ds.errors import UserError

TEXT = "tea for €5 … naïve Straße\r\nПривет, мир\r日本語 🎉\n\u2028\x0c\x85\0 end\n"  # noqa: RUF001
MARKED = {
    "utf8": TEXT.encode(),
    "utf8_mark": codecs.BOM_UTF8 + TEXT.encode(),
    "utf16le": codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
    "utf16be": codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
    "utf32le": codecs.BOM_UTF32_LE + TEXT.encode("utf-32-le"),
    "utf32be": codecs.BOM_UTF32_BE + TEXT.encode("utf-32-be"),
}
COMPRESS = {"": bytes, ".gz": gzip.compress, ".ZST": zstandard.compress}


def corpus_of(*files, **settings):
    return Corpus(DataConfig(source="files", files=[str(f) for f in files], store="", **settings))


def texts(corpus):
    return [document.text for document in corpus]


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("encoding", MARKED)
def test_text_is_the_same_in_any_encoding(tmp_path, encoding, ending):
    path = tmp_path / f"a.TXT{ending}"
    path.write_bytes(COMPRESS[ending](MARKED[encoding]))
    assert texts(corpus_of(path)) == ["".join(TextPieces(path))] == [TEXT]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("escaped", [True, False], ids=["escaped", "raw"])
def test_json_lines_are_the_same_in_any_encoding(tmp_path, encoding, ends, escaped):
    wanted = [f"{TEXT}{i}" for i in range(50)]
    lines = [json.dumps({"text": text}, ensure_ascii=escaped) for text in wanted]
    content = ends.join(lines)
    mark = "\ufeff" if encoding.endswith("be") else ""
    (tmp_path / "a.jsonl").write_bytes((mark + content).encode(encoding))
    corpus = corpus_of(tmp_path / "a.jsonl")
    assert texts(corpus) == wanted
    assert corpus.skipped.counts == {}
    assert corpus.done_bytes == corpus.total_bytes


@pytest.mark.parametrize("encoding", MARKED)
def test_a_stream_gives_blocks_of_any_size(encoding):
    content = MARKED[encoding] * (1 if encoding != "utf8" else 4000)
    wanted = content.decode("utf-8" if encoding == "utf8" else encoding[:5].replace("mark", ""))
    wanted = wanted.removeprefix("\ufeff")
    stream = io.BufferedReader(Utf8(io.BytesIO(content)), 7)
    parts = iter(lambda: stream.read(13), b"")
    assert b"".join(parts).decode() == wanted


@pytest.mark.parametrize("line", ["{}: HOST", "тест", "héllo"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_small_files_are_read_in_any_encoding(tmp_path, encoding, line):
    (tmp_path / "a").write_bytes(line.encode(encoding))
    assert read_text(tmp_path / "a") == line


FRENCH = "Une forêt, l'été à Genève : « ça suffit ».\n" * 3
UNMARKED = {
    "utf16le": ("Hello there.\n".encode("utf-16-le"), "looks like UTF-16LE without a byte order"),
    "utf16be": ("Hello there.\n".encode("utf-16-be"), "looks like UTF-16BE without a byte order"),
    "utf32le": ("Hello there.\n".encode("utf-32-le"), "looks like UTF-32LE without a byte order"),
    "utf32be": ("Hello there.\n".encode("utf-32-be"), "`iconv -f UTF-32BE -t UTF-8`"),
    "utf16_russian": ("Привет, мир\n".encode("utf-16-le"), "looks like UTF-16LE"),
    "utf16_greek": ("Ελληνικά\n".encode("utf-16-be"), "looks like UTF-16BE"),
    "utf16_chinese": ("日本語の漢字かな交じり文。\n".encode("utf-16-le"), "looks like UTF-16LE"),
    "utf16_one_letter": ("a\n".encode("utf-16-le"), "looks like UTF-16LE"),
    "latin1": (FRENCH.encode("latin-1"), "line 1, byte 7: 0xea is not UTF-8; convert it"),
    "windows_quotes": (FRENCH.replace("'", "’").encode("cp1252"), "`iconv -f WINDOWS-1252"),  # noqa: RUF001
    "russian": ("Привет, мир".encode("koi8-r"), "line 1, byte 0: 0xf0 is not UTF-8"),
    "japanese": ("\n\n日本語のテキスト".encode("shift-jis"), "line 3, byte 2: 0x93 is not UTF-8"),
    "late": (b"plain line\n" * 5000 + FRENCH.encode("latin-1"), "line 5,001, byte 55,007: 0xea"),
}


@pytest.mark.parametrize("name", UNMARKED)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_another_encoding_is_named_with_its_place(tmp_path, name, suffix):
    content, says = UNMARKED[name]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    for read in (lambda: texts(corpus_of(path)), lambda: list(TextPieces(path))):
        with pytest.raises(UserError) as raised:
            read()
        assert str(path) in str(raised.value)
        assert says in str(raised.value)
        assert "\n" not in str(raised.value)


NO_OTHER_ENCODING = {
    "nul": b"a\0b\0\0c and the rest of it",
    "terminal": b"\x1b[0mcolours\x1b[1m\x0c\n" * 9,
    "nul_between_names": b"\0".join([b"usr/share", b"usr/lib", b"etc"]),
    "one_control": b"\x01",
    "emoji": "🎉👩\u200d👧".encode(),
    "chinese": ("漢字かな交じり文。" * 300).encode(),
    "cut": ("é" * (1 << 20)).encode()[: (1 << 20) + 1] + b"\xa9",
    "empty": b"",
}


@pytest.mark.parametrize("name", NO_OTHER_ENCODING)
def test_unusual_text_is_text(tmp_path, name):
    content = NO_OTHER_ENCODING[name]
    (tmp_path / "a.txt").write_bytes(content)
    assert "".join(TextPieces(tmp_path / "a.txt")) == content.decode()


DAMAGED = {
    "one_byte": b"caf\xe9",
    "two_bytes": b"caf\xe9 caf\xe9",
    "few_of_many": "é".encode() * 20 + b"\xff\xfe\xfd",
    "half_a_pair_utf16": codecs.BOM_UTF16_LE + "a\ud800b".encode("utf-16-le", "surrogatepass"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_spoils_its_document_alone(tmp_path, name):
    (tmp_path / "a.txt").write_bytes(DAMAGED[name])
    (tmp_path / "b.txt").write_text("whole")
    corpus = corpus_of(tmp_path / "*.txt")
    assert texts(corpus) == ["whole"]
    assert corpus.skipped.counts == {"invalid UTF-8": 1}
    assert f"{tmp_path / 'a.txt'} byte " in corpus.skipped.lines()[0]


def test_a_file_that_ends_inside_a_character_is_told(tmp_path):
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF16_LE + b"a\0b")
    with pytest.raises(
        UserError, match=r"a\.txt: cannot be read \(begins as UTF-16LE, .*truncated"
    ):
        texts(corpus_of(tmp_path / "a.txt"))
    with pytest.raises(WrongEncoding):
        Utf8(io.BytesIO(codecs.BOM_UTF32_LE + b"\xff" * 8)).readall()


@pytest.fixture
def pipe():
    """Writes bytes into a pipe, and the path of its other end, as of `<(command)`."""
    ends = []

    def made(content):
        reading, writing = os.pipe()

        def write():
            with os.fdopen(writing, "wb") as file:
                file.write(content)

        thread = threading.Thread(target=write)
        thread.start()
        ends.append((reading, thread))
        return f"/dev/fd/{reading}"

    yield made
    for reading, thread in ends:
        os.close(reading)
        thread.join()


@pytest.mark.parametrize("encoding", MARKED)
def test_a_pipe_is_read_as_a_file_is(pipe, encoding):
    pieces = TextPieces(pipe(MARKED[encoding]))
    assert "".join(pieces) == TEXT
    assert (pieces.total_bytes, pieces.done_bytes) == (0, len(MARKED[encoding]))
    assert texts(corpus_of(pipe(MARKED[encoding]))) == [TEXT]


@pytest.mark.parametrize("ending", COMPRESS)
def test_what_is_compressed_is_known_without_its_name(pipe, tmp_path, ending):
    content = COMPRESS[ending](TEXT.encode())
    (tmp_path / "a.txt").write_bytes(content)
    assert "".join(TextPieces(pipe(content))) == TEXT
    assert texts(corpus_of(tmp_path / "a.txt")) == [TEXT]


@pytest.mark.parametrize("content", ["file", "pipe"])
def test_a_dash_is_standard_input(pipe, tmp_path, content):
    (tmp_path / "a").write_text(TEXT, newline="")
    before = os.dup(0)
    place = pipe(TEXT.encode()) if content == "pipe" else tmp_path / "a"
    given = os.open(place, os.O_RDONLY)
    try:
        os.dup2(given, 0)
        assert text_files.exists("-")
        assert "".join(TextPieces("-")) == TEXT
        os.fstat(0)  # still open
    finally:
        os.dup2(before, 0)
        os.close(before)
        os.close(given)


def test_a_store_is_not_made_of_a_pipe(pipe, tmp_path):
    path = pipe(b"text")
    config = DataConfig(source="files", files=[path], store=str(tmp_path / "store"))
    with pytest.raises(
        UserError, match=rf"data\.files {path}: is a pipe; a store is made of files"
    ):
        prepare(config)
