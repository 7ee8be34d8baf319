"""Makes a token store from a corpus: `infini-ds prepare`.

The content depends only on the corpus and the config, not on the number of workers. Whether a
document is held out depends on nothing but its text. A store appears whole or not at all: it is
written to a directory beside its final place, which is renamed once the manifest is written.
"""

import contextlib
import json
import os
import platform
import shutil
import time
from array import array
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.table import Table

from infini_ds.config import TOKENIZER_FILES, DataConfig
from infini_ds.data.babilong import BabilongCorpus
from infini_ds.data.chat_template import CHAT_TEMPLATE, TOKENIZER_CONFIG
from infini_ds.data.documents import Corpus
from infini_ds.data.encoding import Encoded, encoded_batches
from infini_ds.data.generation_settings import GENERATION
from infini_ds.data.passkey import PasskeyCorpus
from infini_ds.data.progress import CorpusProgress
from infini_ds.data.store import (
    COUNTS,
    FORMAT,
    MANIFEST,
    SPLITS,
    WEIGHT_DTYPE,
    Store,
    check_restored,
    content_settings,
    count_tokens,
    mapped,
    restored_share,
    token_dtype,
)
from infini_ds.data.tokenizer import configured_tokenizer, load_tokenizer
from infini_ds.data.train_tokenizer import no_documents, train_tokenizer
from infini_ds.errors import UserError
from infini_ds.system.causes import cause, one_line
from infini_ds.system.console import Console
from infini_ds.system.resources import cores_at_hand
from infini_ds.system.temporary import only_one_in, temporary_beside
from infini_ds.system.whole_file import sha256_of

# This much text shows whether the tokenizer restores it: no need to read hundreds of gigabytes.
_SURE_BYTES = 64 << 20


def prepare(config: DataConfig, force: bool = False, workers: int = 0) -> Store:
    """Makes the token store that `config` describes, unless it exists already.

    Args:
        force: replace a store that is damaged or was made with other settings.
        workers: number of tokenising processes; 0 starts one for each core.

    Raises:
        UserError: a source, the tokenizer or the store's place is unusable, the tokenizer loses
            too much of the text, there is nothing to train on, or another store is in the way and
            `force` is not given.
        RunError: the store was made, but that cannot be printed.
    """
    path = Path(config.store)
    if path.is_symlink():  # a directory cannot be renamed onto a symbolic link
        path = Path(os.path.realpath(path))
    console = Console()
    empty = _is_empty(path)
    if os.path.exists(path) and not empty and not force:
        store = Store.open(path, config)
        _check_unchanged(store, config)
        console.print(f"data.store {path}: already prepared")
        return store
    began = time.monotonic()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with only_one_in(path.parent):
            _check_replaceable(path)
            if empty:
                path.rmdir()
        with temporary_beside(path) as unfinished:
            written = _write_store(config, unfinished, workers or cores_at_hand(), console)
            with only_one_in(path.parent):
                _publish(unfinished, path)
                store = Store.open(path, config)
    except OSError as error:
        why = cause(error) or one_line(error)
        raise UserError(f"data.store {path}: cannot be written ({why})") from None
    _report(config, written, time.monotonic() - began, console)
    return store


class _Written(NamedTuple):
    """Facts about a new store that are reported to the user."""

    splits: dict[str, dict[str, int]]
    skipped: list[str]
    """Formatted lines, see `Skipped.lines`."""
    change: str
    """The first difference between a text and what its tokens restore, see `Restored`."""


def _write_store(config: DataConfig, path: Path, workers: int, console: Console) -> _Written:
    settings = content_settings(config)
    corpus = _corpus_of(config)
    snapshot = corpus.snapshot  # later changes are noticed by the next call
    kind = config.tokenizer.kind
    model = path / TOKENIZER_FILES[kind]
    if config.tokenizer.model:
        configured_tokenizer(config.tokenizer).save(path)
    elif kind == "sentencepiece":
        console.print(f"training a tokenizer of {config.tokenizer.vocab_size:,} pieces")
        train_tokenizer(corpus, config, model)
        if isinstance(corpus, BabilongCorpus):  # lengths are counted in the tokenizer's tokens
            corpus = BabilongCorpus(config, load_tokenizer(kind, model))
    tokenizer = load_tokenizer(kind, model)

    dtype = token_dtype(tokenizer.vocab_size)
    with contextlib.ExitStack() as stack:
        train, held_out = (
            stack.enter_context(_SplitWriter(path, name, dtype, config)) for name in SPLITS
        )
        progress = stack.enter_context(CorpusProgress(console, "tokenising", corpus.total_bytes))
        changes: dict[bool, str] = {}
        for batch in encoded_batches(corpus, kind, model, workers):
            for document in batch:
                if document.draw < config.held_out_fraction:
                    held_out.add(document)
                else:
                    train.add(document)
                if document.restored.change:  # prefer an example of lost text to one of added text
                    lost = document.restored.text_bytes < document.text_bytes
                    changes.setdefault(lost, document.restored.change)
            if train.text_bytes >= _SURE_BYTES:
                check_restored(config, {"train": train.summary()}, changes.get(True, ""))
            progress.update(
                corpus.done_bytes,
                train.documents + held_out.documents,
                train.text_bytes + held_out.text_bytes,
            )
    if not train.documents + held_out.documents:
        raise UserError(no_documents(corpus, config))
    if not train.documents:
        raise UserError(
            f"data.held_out_fraction ({config.held_out_fraction}): holds out every document; "
            "lower it, or add documents"
        )
    splits = {writer.name: writer.summary() for writer in (train, held_out)}
    check_restored(config, splits, changes.get(True, ""))
    counts = count_tokens(mapped(path / "train.tokens", dtype), tokenizer)
    np.save(path / COUNTS, counts)

    files = sorted(file for file in path.iterdir())
    manifest = {
        "format": FORMAT,
        "tokenizer": {
            "kind": kind,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
        },
        "settings": settings,
        "source": {"description": _describe(config), "snapshot": snapshot},
        "splits": splits,
        "skipped": corpus.skipped.counts,
        "files": {
            file.name: {"size": file.stat().st_size, "sha256": sha256_of(file)} for file in files
        },
    }
    (path / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return _Written(splits, corpus.skipped.lines(), max(changes.items(), default=(False, ""))[1])


class _SplitWriter:
    """A context manager that appends documents to the files of one split."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, config: DataConfig):
        self.name = name
        self.text_bytes = self.token_bytes = self.restored_bytes = 0
        self._dtype = dtype
        self._offsets = array("q", [0])
        self._groups = array("i")
        self._offsets_file = folder / f"{name}.offsets.npy"
        self._groups_file = folder / f"{name}.groups.npy" if config.grouped else None
        self._tokens_file = (folder / f"{name}.tokens").open("wb")
        self._weights_file = (folder / f"{name}.weights").open("wb") if config.weighted else None

    def __enter__(self) -> "_SplitWriter":
        return self

    def __exit__(self, *_) -> None:
        self._tokens_file.close()
        if self._weights_file:
            self._weights_file.close()
        np.save(self._offsets_file, np.array(self._offsets, dtype=np.int64))
        if self._groups_file:
            np.save(self._groups_file, np.array(self._groups, dtype=np.int32))

    @property
    def documents(self) -> int:
        return len(self._offsets) - 1

    def add(self, document: Encoded) -> None:
        self._tokens_file.write(document.tokens.astype(self._dtype, copy=False).data)
        if self._weights_file and document.weights is not None:
            self._weights_file.write(document.weights.astype(WEIGHT_DTYPE, copy=False).data)
        self._offsets.append(self._offsets[-1] + len(document.tokens))
        self._groups.append(document.group)
        self.text_bytes += document.text_bytes
        self.token_bytes += document.restored.token_bytes
        self.restored_bytes += document.restored.text_bytes

    def summary(self) -> dict[str, int]:
        return {
            "documents": self.documents,
            "tokens": self._offsets[-1],
            "bytes": self.text_bytes,
            "token_bytes": self.token_bytes,
            "restored_bytes": self.restored_bytes,
        }


def _corpus_of(config: DataConfig) -> Corpus:
    made = {"passkey": PasskeyCorpus, "babilong": BabilongCorpus}
    return made.get(config.source, Corpus)(config)


def _is_empty(path: Path) -> bool:
    """Tells whether the path is an empty directory."""
    try:
        return not any(path.iterdir())
    except OSError:
        return False


def _check_unchanged(store: Store, config: DataConfig) -> None:
    try:
        snapshot = _corpus_of(config).snapshot
    except UserError:
        return  # a finished store may be used without its sources
    if snapshot != store.manifest["source"]["snapshot"]:
        setting = f"data.{config.source}.text_files" if config.made else "data.files"
        raise UserError(
            f"{setting}: files have changed since data.store {store.path} was made; run "
            "`infini-ds prepare CONFIG --force`, or name another data.store"
        )


def _check_replaceable(path: Path) -> None:
    """Refuses to replace anything but a token store, since the name may be a mistake."""
    if not path.exists():
        return
    known = {MANIFEST, COUNTS, *filter(None, TOKENIZER_FILES.values()), TOKENIZER_CONFIG}
    known |= {CHAT_TEMPLATE, GENERATION}
    known.update(
        f"{name}{end}"
        for name in SPLITS
        for end in (".tokens", ".weights", ".offsets.npy", ".groups.npy")
    )
    if not path.is_dir() or not {file.name for file in path.iterdir()} <= known:
        raise UserError(
            f"data.store {path}: exists and is not a token store; name another directory"
        )


def _publish(unfinished: Path, path: Path) -> None:
    """Renames a finished store to its place; a full directory there must be moved away first."""
    old = unfinished.with_suffix(".old.partial")
    there = path.exists()
    if there:
        path.rename(old)
    try:
        unfinished.rename(path)
    except OSError:
        if there:
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _describe(config: DataConfig) -> str:
    if config.source == "python-stdlib":
        return f"standard library of Python {platform.python_version()}"
    if config.source == "huggingface":
        return f"{config.dataset} {config.dataset_config} {config.dataset_split}"
    if config.source == "passkey":
        return f"pass keys in {config.passkey.filler} filler"
    if config.source == "babilong":
        return f"{', '.join(config.babilong.tasks)} in {config.babilong.filler} filler"
    return ", ".join(config.files)


def _report(config: DataConfig, written: _Written, seconds: float, console: Console) -> None:
    table = Table(title=f"data.store {config.store} ({seconds:.1f} s)")
    table.add_column("split")
    for heading in ("documents", "tokens", "bytes", "bytes per token"):
        table.add_column(heading, justify="right")
    if written.change:
        table.add_column("restored", justify="right")
    for name, split in written.splits.items():
        ratio = split["bytes"] / split["tokens"] if split["tokens"] else 0.0
        row = [f"{split[key]:,}" for key in ("documents", "tokens", "bytes")]
        back = [f"{restored_share({name: split}):.2%}"] if written.change else []
        table.add_row(name, *row, f"{ratio:.3f}", *back)
    console.print(table)
    if written.change:
        console.print(f"warning: the tokenizer changes text: {written.change}")
    for line in written.skipped:
        console.print(line)
    if config.held_out_fraction and not written.splits["held_out"]["documents"]:
        console.print(
            "warning: no document was held out; raise data.held_out_fraction or add documents"
        )
