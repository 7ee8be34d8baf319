"""Downloads checkpoints from the Hugging Face hub by name."""

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from infini_ds.errors import UserError

_SETTINGS = ["*.json", "tokenizer*", "merges.txt", "chat_template*"]
# Folders, and a second copy of the weights beside those that the index names.
_LEFT_OUT = ["*/*", "consolidated*"]


def is_name(path: Path) -> bool:
    """Tells whether a path can only be a name on the hub, ORGANISATION/MODEL."""
    return not path.exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(path)) is not None


def download(name: str, weights: bool) -> Path:
    """Downloads a checkpoint unless it is cached, and returns its directory in the hub's cache.

    Args:
        weights: whether to include the safetensors, beside the settings and the tokenizer.

    Raises:
        UserError: the hub has no such model, refuses access to it, or cannot be reached.
    """
    patterns = [*_SETTINGS, *(["*.safetensors"] if weights else [])]
    try:
        found = huggingface_hub.snapshot_download(
            name, allow_patterns=patterns, ignore_patterns=_LEFT_OUT
        )
    except GatedRepoError:
        raise UserError(
            f"{name}: is given on the Hugging Face hub only to those who accept its terms; do so "
            "on its page there, and log in with `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{name}: no such directory, and no such model on the Hugging Face hub (a private one "
            "needs `hf auth login`)"
        ) from None
    except Exception as error:  # connection errors come from several libraries
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"{name}: no such directory, and the Hugging Face hub cannot be asked for it ({reason})"
        ) from None
    return Path(found)
