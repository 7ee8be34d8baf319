"""Reads the token store of a run's corpus, or the stores of a mixture as one."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from infini_ds.config import DataConfig
from infini_ds.data.joined import Joined
from infini_ds.data.store import SPLITS, WEIGHT_DTYPE, Split, Store


class Mixture:
    """Open stores that share one tokenizer. Documents are numbered one store after another.

    Attributes:
        stores: the stores by name, in the order of `DataConfig.corpora`.
        tokenizer: the tokenizer they share.
    """

    def __init__(self, stores: dict[str, Store], weights: Sequence[float] = ()):
        self.stores = stores
        self._weights = weights
        self.tokenizer = self._all[0].tokenizer
        self._splits = {name: _join([s.split(name) for s in self._all]) for name in SPLITS}

    @property
    def _all(self) -> list[Store]:
        return list(self.stores.values())

    @classmethod
    def open(cls, config: DataConfig, settings: bool = True) -> "Mixture":
        """Opens the stores of a run's data.

        Args:
            settings: whether the stores must have been made with the settings of `config`.

        Raises:
            UserError: as in `Store.open`.
        """
        stores = {
            name: Store.open(corpus.store, corpus if settings else None)
            for name, corpus in config.corpora.items()
        }
        return cls(stores, [*config.weights.values()])

    def split(self, name: str) -> Split:
        """Returns the split `train` or `held_out` of all stores."""
        return self._splits[name]

    @property
    def shares(self) -> list[tuple[int, float]]:
        """Number of training documents and weight of each corpus; empty without a mixture."""
        return [
            (len(store.split("train").lengths), weight)
            for store, weight in zip(self._all, self._weights, strict=bool(self._weights))
        ]

    @property
    def fingerprint(self) -> str:
        """Identifies all content read from the stores; a single store's is its own fingerprint."""
        if not self._weights:
            return self._all[0].fingerprint
        names = json.dumps({name: store.fingerprint for name, store in self.stores.items()})
        return hashlib.sha256(names.encode()).hexdigest()

    @property
    def bytes_per_token(self) -> float:
        """Average number of bytes of text per training token."""
        sizes = [store.manifest["splits"]["train"] for store in self._all]
        ratios = [size["bytes"] / size["tokens"] for size in sizes]
        return float(np.average(ratios, weights=self._weights or None))

    @property
    def place(self) -> str:
        """Location of the stores, for messages."""
        stores = ", ".join(str(store.path) for store in self._all)
        return f"{'data.mixture: stores' if self._weights else 'data.store'} {stores}"

    def place_of(self, documents: Sequence[int]) -> str:
        """Returns the location of some training documents, for messages."""
        places, first = [], 0
        for store in self._all:
            end = first + len(store.split("train").lengths)
            own = [str(document - first) for document in documents if first <= document < end]
            if own:
                places.append(f"data.store {store.path}, in train documents {', '.join(own)}")
            first = end
        return "; ".join(places)


def _join(splits: list[Split]) -> Split:
    if len(splits) == 1:
        return splits[0]
    lengths = np.concatenate([split.lengths for split in splits])
    weights = None
    if any(split.weights is not None for split in splits):
        weights = Joined([_weights(split) for split in splits])
    return Split(
        Joined([split.data for split in splits]), np.r_[0, np.cumsum(lengths)], weights,
        sum(split.text_bytes for split in splits), sum(split.token_bytes for split in splits),
    )  # fmt: skip


def _weights(split: Split) -> np.ndarray | Joined:
    if split.weights is not None:
        return split.weights
    return np.broadcast_to(WEIGHT_DTYPE.type(1), len(split.data))
