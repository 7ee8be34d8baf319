"""Reads DeepSpeed's hostfile: one line `HOST slots=N` per host, blank lines and # comments."""

import codecs
import re
from pathlib import Path

from infini_ds.errors import UserError

# ssh would read a name that begins with a dash as an option, and pdsh reads brackets and commas as
# lists.
_LINE = re.compile(r"([\w.:][\w.:@-]*)\s+slots=([1-9]\d*)\s*(#.*)?", re.ASCII)
_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_hostfile(path: str | Path) -> dict[str, int]:
    """Returns the slots of each host, in the order of the file.

    Raises:
        UserError: the file cannot be read, names no host or one twice, or has a line in another
            form.
    """
    try:
        if Path(path).read_bytes().startswith(_MARKS):
            raise UserError(
                f"hostfile {path}: begins with a byte order mark, which DeepSpeed takes for a part "
                "of the first name; save it as UTF-8 without one"
            )
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"hostfile {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"hostfile {path}: is not text") from None
    slots: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if not match:
            raise UserError(f"hostfile {path} line {number}: {line!r} must be HOST slots=N")
        if match[1] in slots:
            raise UserError(f"hostfile {path} line {number}: {match[1]} is named twice")
        slots[match[1]] = int(match[2])
    if not slots:
        raise UserError(f"hostfile {path}: names no host; a line for each: HOST slots=N")
    return slots
