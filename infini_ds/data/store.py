"""The token store: a directory of memory-mapped tokens that is checked before it is read.

| file | content |
|---|---|
| `manifest.json` | what the store was made from; sizes and checksums of all other files |
| `SPLIT.tokens` | BOS, tokens, EOS of each document; uint16, or uint32 for large vocabularies |
| `SPLIT.weights` | float32, loss weight of each token; only if the corpus has weights |
| `SPLIT.offsets.npy` | int64 [documents + 1]: where each document begins in SPLIT.tokens |
| `SPLIT.groups.npy` | int32 [documents]: number of pass keys in each; only if there are several |
| `train.counts.npy` | int64 [vocab]: how often each token occurs in train, without BOS |
| `tokenizer.model` | the sentencepiece model, if the tokenizer is one |
| `tokenizer.json`, `tokenizer_config.json` | its files, if it is one of the library `tokenizers` |
| `chat_template.jinja` | its chat template, if tokenizer_config.json has another or none |

The splits are `train` and `held_out`. A store without a valid manifest does not exist.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from infini_ds.config import TOKENIZER_FILES, DataConfig, PasskeyConfig
from infini_ds.data.joined import Joined
from infini_ds.data.tokenizer import configured_tokenizer, load_tokenizer
from infini_ds.data.tokenizer_base import Tokenizer
from infini_ds.errors import UserError
from infini_ds.system.whole_file import sha256_of

FORMAT = 1
MANIFEST = "manifest.json"
COUNTS = "train.counts.npy"
SPLITS = ("train", "held_out")
_SIZES = ("documents", "tokens", "bytes")
# Sizes of restored text, which older stores lack.
_SIZES_SINCE = ("token_bytes", "restored_bytes")
WEIGHT_DTYPE = np.dtype("<f4")
# Larger files are not read whole at every start; `verify` reads them.
_CHECKED_ON_OPEN = 256 << 20
_COUNTED_AT_ONCE = 1 << 24
# Settings that older stores lack, with the values by which those were made.
_SETTINGS_SINCE = {
    f"data.passkey.{name}": PasskeyConfig.model_fields[name].default
    for name in ("queries", "values", "form")
}


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the type in which a token is stored."""
    return np.dtype("<u2" if vocab_size <= 65536 else "<u4")


def stored_tokens(parts: Sequence[np.ndarray], vocab_size: int) -> np.ndarray:
    """Concatenates token ids in the type in which they are stored.

    Raises:
        UserError: an id is outside the tokenizer's vocabulary.
    """
    tokens = np.concatenate(parts)
    if len(tokens) and (largest := tokens.max()) >= vocab_size:
        raise UserError(f"data.tokenizer: gives token {largest}, but has {vocab_size} tokens")
    return tokens.astype(token_dtype(vocab_size), copy=False)


def content_settings(config: DataConfig) -> dict[str, Any]:
    """Collects the settings that decide the content of a store, by their names in the config.

    Raises:
        UserError: the given tokenizer model cannot be read.
    """
    field = config.field_setting
    names = {
        "files": ["files", "document_separator", field],
        "huggingface": ["dataset", "dataset_config", "dataset_split", field],
    }.get(config.source, [])
    settings = {
        f"data.{name}": getattr(config, name)
        for name in ("source", *names, "max_documents", "held_out_fraction")
    }
    if config.made:
        for name, value in config.made.model_dump().items():
            setting = f"data.{config.source}.{name}"
            if value != _SETTINGS_SINCE.get(setting):
                settings[setting] = value
    tokenizer = config.tokenizer
    settings["data.tokenizer.kind"] = tokenizer.kind
    if config.messages_field:
        chat = configured_tokenizer(tokenizer)
        written = json.dumps([chat.chat_template, chat.template_names], sort_keys=True)
        settings["data.tokenizer.chat_template"] = hashlib.sha256(written.encode()).hexdigest()
    if tokenizer.kind != "bytes":
        # The model's content matters, not its place.
        settings["data.tokenizer.model"] = (
            load_tokenizer(tokenizer.kind, tokenizer.model).fingerprint if tokenizer.model else ""
        )
        if not tokenizer.model:
            settings["data.tokenizer.vocab_size"] = tokenizer.vocab_size
            settings["data.tokenizer.training_bytes"] = tokenizer.training_bytes
    return settings


class Split:
    """The documents of one split of a store, or of several stores.

    Attributes:
        offsets: int64 [documents + 1], where each document begins in `data`.
        lengths: int64 [documents], tokens of each document, including BOS and EOS.
        data: uint16 or uint32 [tokens], memory-mapped.
        weights: float32 [tokens], memory-mapped: loss weight of each token where it is the label.
            None if all weights are 1.
        groups: int32 [documents], number of pass keys in each; None if it is not stored.
        text_bytes: size of the documents' text in bytes; 0 if it is not known.
        token_bytes: bytes that their tokens stand for, which differs if the tokenizer changes text.
    """

    def __init__(
        self,
        data: np.ndarray | Joined,
        offsets: np.ndarray,
        weights: np.ndarray | Joined | None = None,
        text_bytes: int = 0,
        token_bytes: int = 0,
        groups: np.ndarray | None = None,
    ):
        self.data = data
        self.weights = weights
        self.text_bytes = text_bytes
        self.token_bytes = token_bytes
        self.groups = groups
        self.offsets = offsets
        self.lengths = np.diff(offsets)

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Returns tokens start to stop of a document, clipped to its end: a view."""
        begin, end = self.offsets[document], self.offsets[document + 1]
        return self.data[min(begin + start, end) : min(begin + stop, end)]

    @property
    def byte_scale(self) -> float:
        """Average bytes of text per byte that tokens stand for: 1 unless the tokenizer changes
        text. With it, bits per byte refer to the text as it was."""
        return self.text_bytes / self.token_bytes if self.text_bytes and self.token_bytes else 1.0

    def has_answers(self) -> bool:
        """Whether any weight is above 1; reads up to the first such weight."""
        weights = self.weights
        if weights is None:
            return False
        blocks = range(0, len(weights), _COUNTED_AT_ONCE)
        return any((weights[i : i + _COUNTED_AT_ONCE] > 1).any() for i in blocks)


class Store:
    """An open token store, checked and opened by `Store.open`."""

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path = path
        self.manifest = manifest
        kind = manifest["tokenizer"]["kind"]
        self.tokenizer: Tokenizer = load_tokenizer(kind, path / TOKENIZER_FILES[kind])
        self._splits = {name: self._open_split(name) for name in SPLITS}

    def _open_split(self, name: str) -> Split:
        weights = None
        if f"{name}.weights" in self.manifest["files"]:
            weights = mapped(self.path / f"{name}.weights", WEIGHT_DTYPE)
        groups = None
        if f"{name}.groups.npy" in self.manifest["files"]:
            groups = np.load(self.path / f"{name}.groups.npy")
        sizes = self.manifest["splits"][name]
        return Split(
            mapped(self.path / f"{name}.tokens", token_dtype(self.tokenizer.vocab_size)),
            np.load(self.path / f"{name}.offsets.npy"),
            weights,
            sizes["bytes"],
            sizes.get("token_bytes", sizes["bytes"]),
            groups,
        )

    @classmethod
    def open(cls, path: str | Path, config: DataConfig | None = None) -> "Store":
        """Opens a store, and checks that it is whole and matches `config`.

        Raises:
            UserError: it is missing, unfinished, damaged, or was made with other settings.
        """
        path = Path(path)
        if not os.path.exists(path):
            raise UserError(f"data.store {path}: not found; run `infini-ds prepare CONFIG`")
        manifest = _read_manifest(path)
        _check_files(path, manifest, _CHECKED_ON_OPEN)
        if config is not None:
            wanted = content_settings(config)
            for name in dict.fromkeys([*wanted, *manifest["settings"]]):
                had, want = (
                    settings.get(name, _SETTINGS_SINCE.get(name))
                    for settings in (manifest["settings"], wanted)
                )
                if had != want:
                    raise UserError(
                        f"{name} is {want!r}, but data.store {path} was made with {had!r}; name "
                        "another data.store, or run `infini-ds prepare CONFIG --force`"
                    )
            check_restored(config, manifest["splits"])
        try:
            return cls(path, manifest)
        except OSError as error:
            raise UserError(f"data.store {path}: cannot be read ({error})") from None

    def verify(self) -> None:
        """Reads every file whole and compares its checksum.

        Raises:
            UserError: a file is damaged.
        """
        _check_files(self.path, self.manifest, None)

    @property
    def fingerprint(self) -> str:
        """Identifies all content read from the store; equal stores share it wherever they lie."""
        files = json.dumps(self.manifest["files"], sort_keys=True)
        return hashlib.sha256(files.encode()).hexdigest()

    def split(self, name: str) -> Split:
        """Returns the split `train` or `held_out`."""
        return self._splits[name]

    def check_tokens(self, name: str, documents: int) -> None:
        """Reads the first documents of a split, since large files are not checked on opening.

        Raises:
            UserError: a document holds a token outside the tokenizer's vocabulary.
        """
        split, known = self.split(name), self.tokenizer.vocab_size
        tokens = split.data[: split.offsets[documents]]
        for i in range(0, len(tokens), _COUNTED_AT_ONCE):
            bad = np.flatnonzero(tokens[i : i + _COUNTED_AT_ONCE] >= known)
            if len(bad):
                document = int(np.searchsorted(split.offsets, i + bad[0], side="right")) - 1
                raise _damaged(
                    self.path / f"{name}.tokens",
                    f"document {document} holds tokens that its tokenizer does not have",
                )

    def unigram_bits_per_byte(self, documents: int | None = None) -> float:
        """Computes the held-out score of a model that only knows how frequent tokens are.

        It is the cross-entropy of the held-out tokens (all but BOS) under the train frequencies
        plus one, in bits per byte of the text they stand for.

        Args:
            documents: number of held-out documents to use, from the first; all by default.

        Raises:
            UserError: there is no held-out text.
        """
        split = self.split("held_out")
        end = split.offsets[-1 if documents is None else documents]
        held_out = count_tokens(split.data[:end], self.tokenizer)
        text_bytes = float(held_out @ self.tokenizer.token_bytes) * split.byte_scale
        if not text_bytes:
            raise UserError(
                f"data.store {self.path}: no held-out text; raise data.held_out_fraction"
            )
        train = np.load(self.path / COUNTS)
        bits = np.log2(train.sum() + len(train)) - np.log2(train + 1)
        return float(held_out @ bits) / text_bytes


def restored_share(splits: dict[str, dict[str, Any]]) -> float:
    """Returns the share of all text bytes that the tokens restore; 1 if it is not known.

    Args:
        splits: the splits of a manifest.
    """
    sizes = splits.values()
    text_bytes = sum(size["bytes"] for size in sizes)
    back = sum(size.get("restored_bytes", size["bytes"]) for size in sizes)
    return back / text_bytes if text_bytes else 1.0


def check_restored(config: DataConfig, splits: dict[str, dict[str, Any]], change: str = "") -> None:
    """Refuses a tokenizer that loses too much of the text.

    Args:
        splits: the splits of a manifest.
        change: an example of what is lost.

    Raises:
        UserError: less text comes back than the config demands.
    """
    share, tokenizer = restored_share(splits), config.tokenizer
    if share < tokenizer.min_restored:
        example = f" ({change})" if change else ""
        raise UserError(
            f"data.tokenizer.min_restored ({tokenizer.min_restored:g}): "
            f"{tokenizer.model or tokenizer.kind} restores {share:.2%} of the bytes of the text"
            f"{example}; take another tokenizer, or lower it"
        )


def count_tokens(data: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Counts how often each token occurs, without BOS: int64 [vocab]."""
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for i in range(0, len(data), _COUNTED_AT_ONCE):
        counts += np.bincount(data[i : i + _COUNTED_AT_ONCE], minlength=len(counts))
    counts[tokenizer.bos_id] = 0
    return counts


def mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    """Maps the numbers in a file into memory."""
    if not path.stat().st_size:
        return np.empty(0, dtype=dtype)  # an empty file cannot be mapped
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if isinstance(manifest, dict) and manifest.get("format") == FORMAT:
            _check_entries(manifest)
    except (OSError, ValueError, RecursionError):
        raise UserError(
            f"data.store {path}: has no valid {MANIFEST}, so it is not a finished store; run "
            "`infini-ds prepare CONFIG --force`"
        ) from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(
            f"data.store {path}: {MANIFEST} is not of format {FORMAT}; run "
            "`infini-ds prepare CONFIG --force`"
        )
    return manifest


def _check_entries(manifest: dict[str, Any]) -> None:
    """Raises ValueError if an entry is not as `prepare` writes it."""
    _dict(manifest.get("settings"))
    tokenizer, source, splits, files = (
        _dict(manifest.get(name)) for name in ("tokenizer", "source", "splits", "files")
    )
    kind = str(tokenizer.get("kind"))
    needed = {COUNTS, *(f"{name}{end}" for name in SPLITS for end in (".tokens", ".offsets.npy"))}
    if TOKENIZER_FILES.get(kind):
        needed.add(TOKENIZER_FILES[kind])
    sizes = [_dict(splits.get(name)).get(key) for name in SPLITS for key in _SIZES]
    sizes += [_dict(file).get("size") for file in files.values()]
    sizes += [splits[name].get(key, 0) for name in SPLITS for key in _SIZES_SINCE]
    texts = [source.get("snapshot"), *(file.get("sha256") for file in files.values())]
    if not (
        kind in TOKENIZER_FILES
        and needed <= files.keys()
        and all(type(size) is int for size in sizes)
        and all(isinstance(text, str) for text in texts)
        and splits["train"]["documents"] > 0
    ):
        raise ValueError


def _dict(entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise ValueError
    return entry


def _check_files(path: Path, manifest: dict[str, Any], up_to: int | None) -> None:
    """Checks the sizes of all files, and the checksums of those below `up_to` bytes (None: all)."""
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise _damaged(file, "is missing")
        size = file.stat().st_size
        if size != expected["size"]:
            raise _damaged(file, f"has {size} bytes, should have {expected['size']}")
        try:
            whole = (up_to is not None and size >= up_to) or sha256_of(file) == expected["sha256"]
        except OSError as error:
            raise UserError(f"data.store {file}: cannot be read ({error.strerror})") from None
        if not whole:
            raise _damaged(file, "is damaged (wrong checksum)")


def _damaged(file: Path, what: str) -> UserError:
    return UserError(f"data.store {file}: {what}; run `infini-ds prepare CONFIG --force`")
