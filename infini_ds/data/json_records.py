"""Reads JSON records: one per line, an array of them, or records that span many lines."""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from itertools import chain
from typing import IO, Any

from infini_ds.system.causes import one_line

_BLOCK_BYTES = 1 << 16
_SPACE = re.compile(r"[ \t\r\n]*")
# A name or an escape that is cut by the end of a block is no longer than this.
_LONGEST_CUT = 12


class InvalidJson(ValueError):
    """A file that is a single piece of JSON ends or continues as JSON must not."""


def json_records(content: IO[bytes], skip: Callable[[str, str], None]) -> Iterator[tuple[str, Any]]:
    """Streams the records of a file of any size, each with its place, such as `:3`.

    Args:
        content: UTF-8 text; lines may end with CR alone.
        skip: called with the reason and the place of each line that is left out.

    Raises:
        InvalidJson: an array, or a record over many lines, is invalid; the rest cannot be read.
    """
    first, begin = b" ", 1
    while first.isspace():
        first = content.read(1)
        begin += first == b"\n"
    if first == b"[":
        yield from _in_one(_Text(content, ""), array=True)
        return
    start = first + content.readline()
    if start.rstrip()[-1:] in (b"{", b"[", b","):  # no record ends like this
        yield from _in_one(_Text(content, start.decode(errors="surrogateescape")), array=False)
        return
    for number, line in enumerate(chain([start], content), begin):
        # Valid JSON never contains a raw line end, so splitting there is safe.
        for part in filter(None, map(bytes.strip, line.split(b"\r"))):
            try:
                record = json.loads(part.removeprefix(codecs.BOM_UTF8).decode())
            except UnicodeDecodeError:
                skip("invalid UTF-8", f":{number}")
            except (ValueError, RecursionError):  # Python limits the digits of an integer
                skip("invalid JSON", f":{number}")
            else:
                yield f":{number}", record


def _in_one(text: "_Text", array: bool) -> Iterator[tuple[str, Any]]:
    number = 0
    while (following := text.peek()) not in ("", "]"):
        if array and number:
            if following != ",":
                raise text.invalid("expecting a comma between records")
            text.take()
        number += 1
        yield f" record {number}", text.value()
    if array and not following:
        raise text.invalid("the array has no end")
    if array:
        text.take()
    if text.peek():
        raise text.invalid("there is something after the end")


class _Text:
    """Text that is read only as far as the next value needs.

    Bytes that are not UTF-8 become halves of surrogate pairs, so that they spoil only their record.
    """

    def __init__(self, content: IO[bytes], begin: str):
        self._content = content
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._scan = json.JSONDecoder().raw_decode
        self._text, self._at, self._ended = begin, 0, False
        self._lines = 1

    def peek(self) -> str:
        """Returns the next character that is not white space; empty at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space
            self._at = space.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._read_on()

    def take(self) -> None:
        """Moves past the character that `peek` returned."""
        self._at += 1

    def value(self) -> Any:
        """Parses the value that begins at the next character.

        Raises:
            InvalidJson: no value begins there.
        """
        self.peek()
        while True:
            try:
                value, self._at = self._scan(self._text, self._at)
                return value
            except json.JSONDecodeError as error:
                if self._ended or not self._is_cut(error):
                    self._at = error.pos
                    raise self.invalid(error.msg) from None
                self._read_on()
            except (ValueError, RecursionError) as error:
                raise self.invalid(str(error)) from None

    def invalid(self, why: str) -> InvalidJson:
        line = self._lines + self._text.count("\n", 0, self._at)
        return InvalidJson(f"line {line:,}: no valid JSON ({one_line(why)})")

    def _is_cut(self, error: json.JSONDecodeError) -> bool:
        """Tells whether the value may become valid with the text that follows."""
        near = error.pos >= len(self._text) - _LONGEST_CUT
        return near or error.msg.startswith("Unterminated string")

    def _read_on(self) -> None:
        """Doubles the text at hand, so that a long value is not parsed from its start too often."""
        block = self._content.read(max(_BLOCK_BYTES, len(self._text) - self._at))
        self._ended = not block
        self._lines += self._text.count("\n", 0, self._at)
        self._text = self._text[self._at :] + self._decode(block, final=self._ended)
        self._at = 0
