"""Reads a corpus as text documents: Python's own sources, files, or a dataset from the hub."""

import glob
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from infini_ds.config import DataConfig
from infini_ds.data import text_files
from infini_ds.data.chat import Chat, Unusable
from infini_ds.data.corpus_files import digest_of, kind_of, library_sources, matching, unreadable
from infini_ds.data.json_records import InvalidJson, json_records
from infini_ds.errors import UserError
from infini_ds.system.causes import one_line, shortened
from infini_ds.system.paths import argument

_NAMES_KEPT = 3
_FIELDS_TOLD = 20
_PARQUET_ROWS = 64
_LARGEST_WEIGHT = float(np.finfo(np.float32).max)


class Span(NamedTuple):
    """A part of a document, encoded on its own unless a chat template wrote the document."""

    characters: int
    """Length in characters; may be 0."""
    weight: float
    """Loss weight of its tokens, at least 0. The last part's weight also applies to EOS."""


class Document(NamedTuple):
    """One training text."""

    name: str
    """Origin for messages: a path, with a line or row number if it holds several documents."""
    text: str
    spans: tuple[Span, ...] = ()
    """Consecutive parts of the text, if the corpus has weights."""
    group: int = 0
    """Number of pass keys in it, if the corpus has several such numbers."""
    rendered: bool = False
    """Whether a chat template wrote it, so that special tokens in it are tokens."""


class Skipped:
    """Counts the documents left out for each reason, and keeps the first few names."""

    def __init__(self):
        self.counts: dict[str, int] = {}
        self._names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        """Counts one document."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        names = self._names.setdefault(reason, [])
        if len(names) < _NAMES_KEPT:
            names.append(name)

    @property
    def total(self) -> int:
        """Number of documents left out."""
        return sum(self.counts.values())

    def lines(self) -> list[str]:
        """Formats one line for each reason, the most frequent first."""
        lines = []
        for reason, count in sorted(self.counts.items(), key=lambda item: -item[1]):
            more = ", ..." if count > _NAMES_KEPT else ""
            lines.append(f"{count:,} skipped, {reason}: {', '.join(self._names[reason])}{more}")
        return lines


class Corpus:
    """The documents of a config, always in the same order; can be iterated repeatedly.

    `skipped` and `done_bytes` describe the latest iteration. `done_bytes` ends at `total_bytes`,
    the size on disk, which is 0 if it is not known.
    """

    def __init__(self, config: DataConfig):
        self._config = config
        self.skipped = Skipped()
        self.done_bytes = 0
        self._chat = Chat(config) if config.messages_field else None
        self._files: list[Path] = []
        if config.source == "files":
            self._files = matching(config.files)
            for path in self._files:
                kind_of(path)  # report a wrong name before hours of work, not after
        elif config.source == "python-stdlib":
            self._files = library_sources()
        self.total_bytes = sum(map(text_files.size_of, self._files))

    @property
    def snapshot(self) -> str:
        """A checksum that changes when the files do, wherever they lie; empty for other sources.

        A change inside a file of more than 64 MiB goes unnoticed if the file keeps its size.

        Raises:
            UserError: a file cannot be read, or it is a pipe, which can be read only once.
        """
        if self._config.source != "files":
            return ""
        digest = hashlib.sha256()
        for path in self._files:
            try:
                if text_files.is_pipe(path):
                    raise UserError(
                        f"data.files {path}: is a pipe; a store is made of files, which may be "
                        "read again"
                    )
                digest.update(digest_of(path))
            except OSError as error:
                raise unreadable(path, error) from None
        return digest.hexdigest()

    def __iter__(self) -> Iterator[Document]:
        self.skipped = Skipped()
        self.done_bytes = 0
        left = self._config.max_documents or -1
        for name, value in self._records():
            if left == 0:
                return
            document = self._document_of(name, value)
            if document:
                left -= 1
                yield document

    def _document_of(self, name: str, value: Any) -> Document | None:
        """Turns a record into a document, or returns None if the record is skipped."""
        if self._chat:
            try:
                text, parts = self._chat.written(value)
            except Unusable as error:
                self.skipped.add(str(error), name)
                return None
            return Document(name, text, tuple(Span(*part) for part in parts), rendered=True)
        weighted = self._config.weighted
        pieces = _pieces_of(value) if weighted else [(value, 1.0)]
        try:
            texts = [_checked_text(text) for text, _ in pieces]
        except UnicodeError as error:
            place = f" byte {error.start}" if isinstance(error, UnicodeDecodeError) else ""
            self.skipped.add("invalid UTF-8", name + place)
            return None
        except TypeError:
            reason = "field is not text or weighted pieces" if weighted else "field is not text"
            self.skipped.add(reason, name)
            return None
        text = "".join(texts)
        if not text:
            self.skipped.add("empty", name)
            return None
        if not weighted:
            return Document(name, text)
        weights = [weight for _, weight in pieces]
        if not all(_is_weight(weight) for weight in weights):
            self.skipped.add("weight is not a number of at least 0", name)
            return None
        stored = np.array(weights, dtype=np.float32)
        counts = [*map(bool, texts[:-1]), True]  # the last weight also applies to EOS
        if not stored[counts].any():
            self.skipped.add("all weights are 0", name)
            return None
        return Document(name, text, tuple(map(Span, map(len, texts), weights)))

    def _records(self) -> Iterator[tuple[str, Any]]:
        if self._config.source == "python-stdlib":
            return self._stdlib_records()
        if self._config.source == "huggingface":
            return self._dataset_records()
        return self._file_records()

    def _stdlib_records(self) -> Iterator[tuple[str, Any]]:
        from pydoc_data.topics import topics

        root = Path(sysconfig.get_paths()["stdlib"])
        for path in self._files:
            content = path.read_bytes()
            self.done_bytes += len(content)
            yield path.relative_to(root).as_posix(), content
        for topic in sorted(topics):
            yield f"help topic {topic}", topics[topic]

    def _file_records(self) -> Iterator[tuple[str, Any]]:
        for path in self._files:
            before, found = self.done_bytes, self.skipped.total
            try:
                for record in self._records_of(path):
                    found = -1
                    yield record
                self.done_bytes = before + text_files.size_of(path)
            except InvalidJson as error:
                raise UserError(f"data.files {path}: {error}") from None
            except text_files.UNREADABLE as error:
                raise unreadable(path, error) from None
            if found == self.skipped.total:  # nothing was yielded and nothing skipped
                self.skipped.add("empty", str(path))

    def _records_of(self, path: Path) -> Iterator[tuple[str, Any]]:
        kind, before = kind_of(path), self.done_bytes
        if kind == "parquet":
            yield from self._parquet_records(path)
            return
        with text_files.open_text(path) as (content, source):
            if kind == "text":
                yield from self._text_records(path, content.read())
                return
            for record in self._json_records(path, content):
                self.done_bytes = before + source.done_bytes
                yield record

    def _text_records(self, path: Path, content: bytes) -> Iterator[tuple[str, Any]]:
        separator = self._config.document_separator.encode()
        if not separator:
            yield str(path), content
            return
        begin, number = 0, 0
        while begin < len(content):
            end = content.find(separator, begin + 1)
            end = len(content) if end < 0 else end
            number += 1
            yield f"{path} part {number}", content[begin:end]
            begin = end

    def _json_records(self, path: Path, content: IO[bytes]) -> Iterator[tuple[str, Any]]:
        def skip(reason: str, place: str) -> None:
            self.skipped.add(reason, f"{path}{place}")

        for place, record in json_records(content, skip):
            name = f"{path}{place}"
            yield name, self._field(record, f"data.files {name}")

    def _parquet_records(self, path: Path) -> Iterator[tuple[str, Any]]:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet

        setting, name = _field_of(self._config)
        # Read the text as bytes: one row of invalid UTF-8 must not end the whole file.
        kind: Any = pyarrow.large_binary()
        content = "messages" if self._chat else "text"
        if self._config.weighted_field:
            content = "lists of {text, weight}"
            piece = [("text", pyarrow.large_binary()), ("weight", pyarrow.float64())]
            kind = pyarrow.large_list(pyarrow.struct(piece))
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                steps = self._field(_columns(file.schema_arrow), f"data.files {path}")
                if isinstance(steps, dict):
                    raise pyarrow.ArrowTypeError(f"its fields are {', '.join(_names(steps))}")
                number = 0
                for batch in file.iter_batches(_PARQUET_ROWS, columns=[".".join(steps)]):
                    column = batch.column(batch.schema.names.index(steps[0]))
                    for step in steps[1:]:
                        column = pyarrow.compute.struct_field(column, [step])
                    for value in column if self._chat else column.cast(kind):
                        number += 1
                        try:
                            record = f"{path} row {number}", value.as_py()
                        except UnicodeDecodeError:
                            self.skipped.add("invalid UTF-8", f"{path} row {number}")
                        else:
                            yield record
        except pyarrow.ArrowException as error:
            raise UserError(
                f"data.files {path}: cannot be read as parquet with {content} in {setting} "
                f"{name!r} ({one_line(error)})"
            ) from None

    def _dataset_records(self) -> Iterator[tuple[str, Any]]:
        name = f"data.dataset {self._config.dataset}"
        try:
            for number, record in enumerate(_load_dataset(self._config), start=1):
                yield f"{self._config.dataset} record {number}", self._field(record, name)
        except UserError:
            raise
        except Exception as error:  # loaders raise anything: missing, offline, wrong format
            raise _unloadable(self._config, error) from None

    def _field(self, record: Any, where: str) -> Any:
        """Returns the value of a record's text field.

        Raises:
            UserError: the record has no such field.
        """
        setting, field = _field_of(self._config)
        try:
            return _value_at(record, field)
        except KeyError:
            has = "it is no object with fields"
            if isinstance(record, dict):
                names = list(_names(record))
                more = ", ..." if len(names) > _FIELDS_TOLD else ""
                has = f"its fields are {one_line(', '.join(names[:_FIELDS_TOLD]))}{more}"
            raise UserError(f"{where}: has no {setting} {field!r} ({has})") from None


def _value_at(record: Any, field: str) -> Any:
    """Returns the value of a field, perhaps a nested one (`meta.text`); None inside a null field.

    Raises:
        KeyError: there is no such field.
    """
    if not isinstance(record, dict):
        raise KeyError
    if field in record:
        return record[field]
    outer, dot, inner = field.partition(".")
    if not dot:
        raise KeyError
    return None if record[outer] is None else _value_at(record[outer], inner)


def _names(record: dict[str, Any]) -> Iterator[str]:
    """Lists the names of the fields, and of those nested one level deep."""
    for name, value in record.items():
        if isinstance(value, dict) and value:
            yield from (f"{name}.{inner}" for inner in value)
        else:
            yield str(name)


def _columns(schema: Any, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """Maps each field of an arrow schema to the path of names that leads to it."""
    import pyarrow

    return {
        field.name: _columns(field.type, (*above, field.name))
        if pyarrow.types.is_struct(field.type)
        else (*above, field.name)
        for field in schema
    }


def _pieces_of(value: Any) -> list[tuple[Any, Any]]:
    """Splits a record into (text, weight) pairs, neither of which has been checked yet."""
    if not isinstance(value, list):
        return [(value, 1.0)]
    pieces = []
    for piece in value:
        if isinstance(piece, dict):
            piece = piece.get("text"), piece.get("weight")
        if not isinstance(piece, (list, tuple)) or len(piece) != 2:
            return [(None, 1.0)]
        pieces.append(tuple(piece))
    return pieces


def _checked_text(value: Any) -> str:
    """Returns the text, decoded from UTF-8 if it is bytes.

    Raises:
        UnicodeError: the text is invalid.
        TypeError: the value is not text.
    """
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if not isinstance(value, str):
        raise TypeError
    value.encode("utf-8")  # JSON may hold half a surrogate pair, which is not text
    return value


def _is_weight(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 <= value <= _LARGEST_WEIGHT


def _load_dataset(config: DataConfig):
    import datasets

    datasets.disable_progress_bars()
    place = argument("data.dataset", config.dataset)
    local = Path(place)
    if (local / "dataset_dict.json").exists() or (local / "state.json").exists():
        # The directory was written by save_to_disk, which load_dataset refuses.
        saved = datasets.load_from_disk(place)
        if not isinstance(saved, datasets.DatasetDict):
            return saved
        if config.dataset_split not in saved:
            raise ValueError(f"Unknown split. Should be one of {[*saved]}")
        return saved[config.dataset_split]
    if local.exists() and glob.escape(place := str(local.absolute())) != place:
        raise UserError(
            f"data.dataset {place}: has one of [, * and ?, which make `datasets` take it for a "
            "pattern; rename it"
        )
    return datasets.load_dataset(
        place,
        config.dataset_config or None,
        split=config.dataset_split,
        streaming=config.streaming,
    )


def _field_of(config: DataConfig) -> tuple[str, str]:
    """Returns the setting that names the field of the text, and that name."""
    return f"data.{config.field_setting}", getattr(config, config.field_setting)


_OF_DATASETS = (
    (r"[Ss]plit|instruction format", "dataset_split", ""),
    (r"BuilderConfig|[Cc]onfig name", "dataset_config", ""),
    (
        r"reach|resolve|[Cc]onnect|[Pp]roxy|[Oo]ffline|timed out",
        "dataset",
        "; the hub must be reachable (HTTPS_PROXY, HF_ENDPOINT, HF_HUB_OFFLINE unset), or name a "
        "directory with the dataset's files",
    ),
    (
        r"No space left|quota|Permission denied|Read-only",
        "dataset",
        "; the variable HF_HOME names another place for what is downloaded",
    ),
)
"""Maps words in the library's errors to the setting they concern and a hint that helps."""


def _unloadable(config: DataConfig, error: Exception) -> UserError:
    """Builds the error for a dataset. The library's own words list its splits or configurations."""
    chain = [error]
    while chain[-1].__cause__ and isinstance(chain[-1].__cause__, Exception):
        chain.append(chain[-1].__cause__)
    said = ": ".join(dict.fromkeys(one_line(each) for each in (chain[0], chain[-1])))
    about = ((name, helps) for words, name, helps in _OF_DATASETS if re.search(words, said))
    name, helps = next(about, ("dataset", ""))
    of = "" if name == "dataset" else f" of data.dataset {config.dataset}"
    return UserError(f"data.{name} {getattr(config, name)}{of}: {shortened(said)}{helps}")
