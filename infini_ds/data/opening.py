"""Opens a run's stores and lanes, and checks them against each other and the model."""

from infini_ds.config import RunConfig
from infini_ds.data.curriculum import CurriculumLanes
from infini_ds.data.lanes import Lanes
from infini_ds.data.mixture import Mixture
from infini_ds.errors import UserError


def open_data(config: RunConfig) -> tuple[Mixture, Lanes | CurriculumLanes]:
    """Opens the stores, with the training lanes at their beginning. Loads no torch, so it is fast.

    Raises:
        UserError: a store is missing, damaged or made with other settings, is too small for a step
            or for the curriculum, or lacks the answers that a curriculum needs.
    """
    data = Mixture.open(config.data)
    settings = (
        data.split("train").lengths,
        config.model.segment_length,
        config.train.window_segments,
        config.train.batch_size,
        config.seed,
    )
    if config.train.curriculum:
        if not data.split("train").has_answers():
            raise UserError(
                f"train.curriculum: {data.place} has no answers, which are text of a "
                "weight above 1; remove it, or prepare a store with data.weighted_field"
            )
        groups = data.split("train").groups
        return data, CurriculumLanes(*settings, config.train.curriculum, groups)
    return data, Lanes(*settings, data.shares, config.packed)


def with_vocabulary(config: RunConfig, data: Mixture) -> RunConfig:
    """Returns the config with model.vocab_size taken from the data if it is 0.

    Raises:
        UserError: model.vocab_size is given but too small for the data's tokenizer.
    """
    needed = data.tokenizer.vocab_size
    given = config.model.vocab_size
    if given and given < needed:
        raise UserError(
            f"model.vocab_size ({given}) must be at least {needed}, the tokens of "
            f"{data.place}; 0 takes it from there"
        )
    model = config.model.model_copy(update={"vocab_size": given or needed})
    return config.model_copy(update={"model": model})
