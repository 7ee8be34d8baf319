"""A file in pieces is the file, whatever its lines, and mistakes name it."""

import gzip

import pytest
import zstandard

from infini_ds.data.text_pieces import TextPieces
from infini_ds.errors import UserError

TEXTS = {
    "lines": "".join(f"line {i} of a few wörds\n" for i in range(20_000)),
    "one_long_line": "é€" * 100_000,
    "short": "no line end",
    "windows": "a\r\nb\r\n" * 30_000,
    "empty": "",
}
WRITERS = {"txt": bytes, "gz": gzip.compress, "zst": zstandard.compress}


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("name", TEXTS)
def test_pieces_are_the_text(tmp_path, name, suffix):
    path = tmp_path / f"document.txt.{suffix}"
    path.write_bytes(WRITERS[suffix](TEXTS[name].encode()))
    pieces = TextPieces(path)
    parts = list(pieces)
    assert "".join(parts) == TEXTS[name]
    assert pieces.done_bytes == (pieces.total_bytes if TEXTS[name] else 0)
    assert all(len(part.encode()) <= 3 << 16 for part in parts)
    if name in ("lines", "windows"):
        assert len(parts) > 2
        assert all(part.endswith("\n") for part in parts)


SPOILT = {
    "not_utf8": ("a.txt", b"text \xff\xfe text", "line 1, byte 5: 0xff is not UTF-8"),
    "late": ("a.txt", "é".encode() * 50_000 + b"\xff", "line 1, byte 100,000: 0xff is not UTF-8"),
    "half_a_character": ("a.txt", b"a" + "é".encode()[:1], "line 1, byte 1: 0xc3 is not UTF-8"),
    "not_gzip": ("a.gz", b"text", "Not a gzipped file"),
    "cut_gzip": ("a.gz", gzip.compress(b"text" * 99)[:-9], "ended before"),
    "cut_zst": ("a.zst", zstandard.compress(b"text" * 99)[:-3], "ended before"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_file_that_cannot_be_read_is_named(tmp_path, name):
    file, content, message = SPOILT[name]
    path = tmp_path / file
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        list(TextPieces(path))
    assert str(raised.value).startswith(f"document {path}: cannot be read (")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none.txt: cannot be read \(No such file"):
        TextPieces(tmp_path / "none.txt")
