"""Reads and keeps a model's chat template, which travels with its tokenizer."""

from pathlib import Path

from infini_ds.data.generation_settings import read_settings
from infini_ds.data.text_encoding import read_text
from infini_ds.errors import UserError
from infini_ds.system.causes import one_line

CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"


def read_chat_template(folder: Path) -> str:
    """Reads the template that transformers takes; empty if there is none.

    It is in chat_template.jinja, or in tokenizer_config.json; of several, the one named `default`.

    Args:
        folder: the folder with the tokenizer's files.

    Raises:
        UserError: a file cannot be read.
    """
    if (folder / CHAT_TEMPLATE).is_file():
        return read_template(folder / CHAT_TEMPLATE)
    template = read_settings(folder / TOKENIZER_CONFIG).get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict)]
        template = next((e.get("template") for e in named if e.get("name") == "default"), "")
    return template if isinstance(template, str) else ""


def read_template(file: str | Path, setting: str = "") -> str:
    """Reads a file that is a chat template.

    Args:
        setting: the setting that names it, for messages.

    Raises:
        UserError: the file cannot be read, or is no text.
    """
    try:
        return read_text(file)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else one_line(error)
        raise UserError(f"{setting} {file}: cannot be read ({reason})".lstrip()) from None


def save_chat_template(template: str, folder: Path) -> None:
    """Writes the template, if there is one and tokenizer_config.json has another or none."""
    if template and template != read_chat_template(folder):
        (folder / CHAT_TEMPLATE).write_bytes(template.encode())
