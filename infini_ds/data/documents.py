"""Documents of a corpus, as text: the running Python's own sources, files, or a hub dataset."""

import glob
import gzip
import hashlib
import io
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import zstandard

from infini_ds.config import DataConfig
from infini_ds.errors import UserError
from infini_ds.paths import argument, as_path, check_name

_NAMES_KEPT = 3
_PARQUET_ROWS = 64
_READ_BYTES = 1 << 20
# Of larger files only the beginning and the end tell whether they have changed.
_HASHED_WHOLE = 64 << 20
_LARGEST_WEIGHT = float(np.finfo(np.float32).max)


class Span(NamedTuple):
    """A part of a document that is encoded on its own, so that no token reaches across its ends."""

    characters: int
    """How long it is; may be 0."""
    weight: float
    """Of its tokens in the loss, at least 0. That of the last part is the end of text's too."""


class Document(NamedTuple):
    """One training text."""

    name: str
    """Where it comes from, for messages: a path, with a line or row where there are several."""
    text: str
    spans: tuple[Span, ...] = ()
    """Its parts, one after another, where the corpus has weights."""


class Skipped:
    """Counts what was left out, by reason, and keeps the first few names of each."""

    def __init__(self):
        self.counts: dict[str, int] = {}
        self._names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        """Counts one document."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        names = self._names.setdefault(reason, [])
        if len(names) < _NAMES_KEPT:
            names.append(name)

    def lines(self) -> list[str]:
        """One line for each reason, most frequent first."""
        lines = []
        for reason, count in sorted(self.counts.items(), key=lambda item: -item[1]):
            more = ", ..." if count > _NAMES_KEPT else ""
            lines.append(f"{count:,} skipped, {reason}: {', '.join(self._names[reason])}{more}")
        return lines


class Corpus:
    """The documents of a config, always in the same order; can be iterated again and again.

    `skipped` and `done_bytes` are those of the latest iteration. `total_bytes` is what
    `done_bytes` ends at: bytes on disk; 0 where it is not known.
    """

    def __init__(self, config: DataConfig):
        self._config = config
        self.skipped = Skipped()
        self.done_bytes = 0
        self._files: list[Path] = []
        if config.source == "files":
            self._files = _matching(config.files)
            for path in self._files:
                _kind_of(path)  # a wrong name is reported before hours of work, not after
        elif config.source == "python-stdlib":
            self._files = _library_sources()
        self.total_bytes = sum(path.stat().st_size for path in self._files)

    @property
    def snapshot(self) -> str:
        """Changes when the files do, wherever they are; empty where nothing is known of that.

        Of a file of more than 64 MiB a change inside that keeps its size is not noticed.

        Raises:
            UserError: one of them cannot be read.
        """
        if self._config.source != "files":
            return ""
        digest = hashlib.sha256()
        for path in self._files:
            try:
                digest.update(_digest(path))
            except OSError as error:
                raise _unreadable(path, error) from None
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
        """The document of a record, or None where it is skipped."""
        weighted = self._config.weighted
        pieces = _pieces_of(value) if weighted else [(value, 1.0)]
        try:
            texts = [_checked_text(text) for text, _ in pieces]
        except UnicodeError:
            self.skipped.add("invalid UTF-8", name)
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
        counts = [*map(bool, texts[:-1]), True]  # the last one's is the end of text's too
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
            kind = _kind_of(path)
            before = self.done_bytes
            try:
                if kind == "parquet":
                    yield from self._parquet_records(path)
                else:
                    with path.open("rb") as raw, decompressed(raw, path) as content:
                        if kind == "text":
                            yield from self._text_records(path, content.read())
                        else:
                            for record in self._json_records(path, content):
                                self.done_bytes = before + raw.tell()
                                yield record
            except (EOFError, OSError, zlib.error, zstandard.ZstdError) as error:
                raise _unreadable(path, error) from None
            self.done_bytes = before + path.stat().st_size

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

    def _json_records(self, path: Path, lines: IO[bytes]) -> Iterator[tuple[str, Any]]:
        _, field = _field_of(self._config)
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            name = f"{path}:{number}"
            try:
                record = json.loads(line)
            except UnicodeDecodeError:
                self.skipped.add("invalid UTF-8", name)
                continue
            except (ValueError, RecursionError):  # Python's integers have a limit of digits
                self.skipped.add("invalid JSON", name)
                continue
            if not isinstance(record, dict) or field not in record:
                raise _missing_field(f"data.files {name}", self._config, record)
            yield name, record[field]

    def _parquet_records(self, path: Path) -> Iterator[tuple[str, Any]]:
        import pyarrow
        import pyarrow.parquet

        setting, field = _field_of(self._config)
        # As bytes: one row of invalid UTF-8 must not end the whole file.
        kind: Any = pyarrow.large_binary()
        if self._config.weighted:
            piece = [("text", pyarrow.large_binary()), ("weight", pyarrow.float64())]
            kind = pyarrow.large_list(pyarrow.struct(piece))
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                schema = file.schema_arrow
                if field not in schema.names:
                    record = dict.fromkeys(schema.names)
                    raise _missing_field(f"data.files {path}", self._config, record)
                number = 0
                for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[field]):
                    for value in batch.column(0).cast(kind):
                        number += 1
                        yield f"{path} row {number}", value.as_py()
        except pyarrow.ArrowException as error:
            content = "lists of {text, weight}" if self._config.weighted else "text"
            raise UserError(
                f"data.files {path}: cannot be read as parquet with {content} in {setting} "
                f"{field!r} ({_one_line(error)})"
            ) from None

    def _dataset_records(self) -> Iterator[tuple[str, Any]]:
        _, field = _field_of(self._config)
        name = f"data.dataset {self._config.dataset}"
        try:
            for number, record in enumerate(_load_dataset(self._config), start=1):
                if field not in record:
                    raise _missing_field(name, self._config, record)
                yield f"{self._config.dataset} record {number}", record[field]
        except UserError:
            raise
        except Exception as error:  # a loader's errors are of any kind: missing, offline, format
            raise UserError(f"{name}: {_one_line(error)}") from None


def _pieces_of(value: Any) -> list[tuple[Any, Any]]:
    """The (text, weight) pairs of a record, unchecked; its text has to be checked."""
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
    """Text as it is or as UTF-8.

    Raises:
        UnicodeError: it is not valid.
        TypeError: it is something else.
    """
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if not isinstance(value, str):
        raise TypeError
    value.encode("utf-8")  # JSON may hold half a surrogate pair, which is no text
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
        # Written by save_to_disk, which load_dataset refuses.
        saved = datasets.load_from_disk(place)
        return saved[config.dataset_split] if isinstance(saved, datasets.DatasetDict) else saved
    if local.exists() and glob.escape(place := str(local.absolute())) != place:
        raise UserError(
            f"data.dataset {place}: has one of [, * and ?, with which `datasets` reads other "
            "directories or none; rename it"
        )
    return datasets.load_dataset(
        place,
        config.dataset_config or None,
        split=config.dataset_split,
        streaming=config.streaming,
    )


def _library_sources() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in ("site-packages", "dist-packages")]
        sources += [Path(folder, name) for name in names if name.endswith(".py")]
    if not sources:
        raise UserError(
            f"data.source python-stdlib: {root} has no .py files; use a Python that has its sources"
        )
    return sorted(sources, key=lambda path: path.relative_to(root).as_posix())


def _matching(patterns: list[str]) -> list[Path]:
    """Files in the order of the patterns, sorted within each, none twice by any name."""
    found: dict[str, str] = {}
    for pattern in patterns:
        try:
            expanded = as_path(pattern)
            if os.path.isdir(expanded):
                within = os.path.join(pattern, "*")
                raise ValueError(f"{pattern}: is a directory; name its files: {within}")
            files = sorted(
                path
                for path in glob.iglob(_as_glob(expanded), recursive=True)
                if os.path.isfile(path)
            )
            if not files:
                raise ValueError(f"{pattern or repr(pattern)}: no such file")
            for path in files:
                check_name(path)
        except ValueError as error:
            raise UserError(f"data.files {error}") from None
        for path in files:
            found.setdefault(os.path.realpath(path), path)
    return [Path(path) for path in found.values()]


def _as_glob(path: str) -> str:
    """A pattern of which what is there under just this name, or lies on the way, is literal."""
    literal = path
    while literal and not os.path.exists(literal):
        literal = os.path.dirname(literal.rstrip("/"))
    return glob.escape(literal) + path[len(literal) :]


def _digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as content:
        size = os.fstat(content.fileno()).st_size
        digest.update(size.to_bytes(8, "big"))
        if size > _HASHED_WHOLE:
            digest.update(content.read(_READ_BYTES))
            content.seek(-_READ_BYTES, os.SEEK_END)
        while block := content.read(_READ_BYTES):
            digest.update(block)
    return digest.digest()


def _kind_of(path: Path) -> str:
    """`text`, `jsonl` or `parquet`."""
    suffixes = path.suffixes
    compressed = suffixes[-1:] in ([".gz"], [".zst"])
    suffix = (suffixes[:-1] if compressed else suffixes)[-1:]
    if suffix in ([], [".txt"]):
        return "text"
    if suffix == [".jsonl"]:
        return "jsonl"
    if suffix == [".parquet"] and not compressed:
        return "parquet"
    raise UserError(
        f"data.files {path}: must be .txt, .jsonl (also .gz or .zst), .parquet, or plain text "
        "without an extension"
    )


def decompressed(raw: io.BufferedReader, path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdReader(raw), _READ_BYTES)
    return raw


class _ZstdReader(io.RawIOBase):
    """Frames of zstd as one stream. Unlike zstandard's own reader it notices a truncated file."""

    def __init__(self, raw: IO[bytes]):
        self._raw = raw
        self._frame = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._output:
            self._input = self._input or self._raw.read(_READ_BYTES)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("compressed file ended before its end")
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._output = memoryview(self._frame.decompress(self._input))
            self._input = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size


def _field_of(config: DataConfig) -> tuple[str, str]:
    """The setting that names the field of a document, and the field."""
    if config.weighted_field:
        return "data.weighted_field", config.weighted_field
    return "data.text_field", config.text_field


def _missing_field(where: str, config: DataConfig, record: Any) -> UserError:
    setting, field = _field_of(config)
    has = "no fields"
    if isinstance(record, dict):
        has = f"its fields are {' '.join(', '.join(map(str, record)).split())}"
    return UserError(f"{where}: has no {setting} {field!r} ({has})")


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"data.files {path}: cannot be read ({_one_line(error)})")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
