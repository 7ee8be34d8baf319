"""What a run reads: its token store and its lanes, checked against each other."""

from infini_ds.config import RunConfig
from infini_ds.data.lanes import Lanes
from infini_ds.data.store import Store


def open_data(config: RunConfig) -> tuple[Store, Lanes]:
    """The store and the training lanes at their beginning. Needs no torch, so it answers at once.

    Raises:
        UserError: the store is missing, damaged, of other settings, or too small for a step.
    """
    store = Store.open(config.data.store, config.data)
    lanes = Lanes(
        store.split("train").lengths,
        config.model.segment_length,
        config.train.window_segments,
        config.train.batch_size,
        config.seed,
    )
    return store, lanes
