"""What a run reads: its token store and its lanes, checked against each other and the model."""

from infini_ds.config import RunConfig
from infini_ds.data.curriculum import CurriculumLanes
from infini_ds.data.lanes import Lanes
from infini_ds.data.store import Store
from infini_ds.errors import UserError


def open_data(config: RunConfig) -> tuple[Store, Lanes | CurriculumLanes]:
    """The store and the training lanes at their beginning. Needs no torch, so it answers at once.

    Raises:
        UserError: the store is missing, damaged, of other settings, or too small for a step or
            for the curriculum, or has no answers for it.
    """
    store = Store.open(config.data.store, config.data)
    settings = (
        store.split("train").lengths,
        config.model.segment_length,
        config.train.window_segments,
        config.train.batch_size,
        config.seed,
    )
    if config.train.curriculum:
        if not store.split("train").has_answers():
            raise UserError(
                f"train.curriculum: data.store {store.path} has no answers, which are text of a "
                "weight above 1; remove it, or prepare a store with data.weighted_field"
            )
        return store, CurriculumLanes(*settings, config.train.curriculum)
    return store, Lanes(*settings)


def with_vocabulary(config: RunConfig, store: Store) -> RunConfig:
    """The config with model.vocab_size taken from the store where it is 0.

    Raises:
        UserError: it is given and too small for the store's tokenizer.
    """
    needed = store.tokenizer.vocab_size
    given = config.model.vocab_size
    if given and given < needed:
        raise UserError(
            f"model.vocab_size ({given}) must be at least {needed}, the tokens of data.store "
            f"{store.path}; 0 takes it from there"
        )
    model = config.model.model_copy(update={"vocab_size": given or needed})
    return config.model_copy(update={"model": model})
