"""What the library `datasets` cannot load is told by the setting that is wrong, with what helps."""

import datasets
import pytest

from infini_ds.config import DataConfig
from infini_ds.data.documents import Corpus
from infini_ds.errors import UserError

SPLIT = "data.dataset_split dev of data.dataset a/b: "
CONFIG = "data.dataset_config de of data.dataset a/b: "
DATASET = "data.dataset a/b: "
HUB, HOME = "the hub must be reachable", "HF_HOME names another place"


def corpus(**settings) -> Corpus:
    return Corpus(DataConfig(source="huggingface", store="", **settings))


# As its versions 3 to 5 say it: (error, how the line begins, what helps).
ERRORS = {
    "split": (ValueError("Unknown split \"dev\". Should be one of ['train']."), SPLIT, "['train']"),
    "streamed_split": (ValueError("Bad split: dev. Available splits: ['train']"), SPLIT, "train"),
    "split_name": (ValueError("Split name should match '^\\w+' but got 'dev-'."), SPLIT, "dev-"),
    "slice": (ValueError("Unrecognized instruction format: dev[:x%]"), SPLIT, "instruction"),
    "config": (ValueError("BuilderConfig 'de' not found. Available: ['en']"), CONFIG, "['en']"),
    "no_config": (ValueError("Config name is missing. Please pick one: ['en']"), CONFIG, "['en']"),
    "absent": (FileNotFoundError("Couldn't find any data file at /a/b."), DATASET, "any data file"),
    "unknown": (FileNotFoundError("Dataset 'a/b' doesn't exist on the Hub"), DATASET, "exist on"),
    "dns": (ConnectionError("Couldn't reach 'a/b' on the Hub (LocalEntry)"), DATASET, HUB),
    "proxy": (OSError("HTTPSConnectionPool: Unable to connect to proxy"), DATASET, HUB),
    "offline": (ConnectionError("Offline mode is enabled."), DATASET, HUB),
    "slow": (TimeoutError("The read operation timed out"), DATASET, HUB),
    "full": (OSError(28, "No space left on device", "/h/x.arrow"), DATASET, HOME),
    "quota": (OSError(122, "Disk quota exceeded", "/h/x.arrow"), DATASET, HOME),
    "cache": (PermissionError(13, "Permission denied", "/h/.cache"), DATASET, HOME),
    "long": (ValueError("A table. " + "words " * 500), DATASET, "A table."),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error_of_the_library_names_the_setting(monkeypatch, name):
    error, beginning, helps = ERRORS[name]

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError) as caught:
        next(iter(corpus(dataset="a/b", dataset_split="dev", dataset_config="de")))
    told = str(caught.value)
    assert told.startswith(beginning)
    assert helps in told
    assert "\n" not in told
    assert len(told) < 600


def test_cause_of_an_error_is_told_with_it(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("An error occurred while generating the dataset") from OSError(
            28, "No space left on device"
        )

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"generating the dataset: .*No space left on device; the"):
        next(iter(corpus(dataset="a/b")))


def test_split_that_a_saved_dataset_lacks_is_named_with_those_there(tmp_path):
    saved = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["one"]})})
    saved.save_to_disk(tmp_path)
    with pytest.raises(UserError, match=r"^data\.dataset_split test .*one of \['train'\]$"):
        next(iter(corpus(dataset=str(tmp_path), dataset_split="test")))
