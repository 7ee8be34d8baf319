"""`infini-ds generate`: continues a prompt with a model."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infini_ds.commands.options import Commands, readable_text, with_model
from infini_ds.errors import UserError
from infini_ds.system.arguments import Checked
from infini_ds.system.paths import argument


def add(commands: Commands) -> None:
    """Adds this command to the parser."""
    parser = with_model(commands, "generate", "continue a prompt with a model", _run)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="prompt of any length")
    prompt.add_argument(
        "--prompt-file", action=Checked, check=readable_text, metavar="FILE",
        help="file with the prompt (plain, .gz or .zst), or - for standard input",
    )  # fmt: skip
    parser.add_argument(
        "--chat", action="store_true",
        help="the prompt is what a user says: write it with the model's chat template",
    )  # fmt: skip
    parser.add_argument(
        "--memory", action=Checked, check=_file, metavar="FILE",
        help="memory, from memorize, of a document that the prompt continues",
    )  # fmt: skip
    parser.add_argument(
        "--max-new-tokens", type=int, action=Checked, check=_where(lambda most: most >= 1),
        default=256, help="maximum number of new tokens (%(default)s)",
    )  # fmt: skip
    heat = parser.add_mutually_exclusive_group()
    heat.add_argument(
        "--temperature", type=float, action=Checked, check=_where(lambda t: 0 <= t < math.inf),
        default=1.0, help="sampling temperature (%(default)s)",
    )  # fmt: skip
    heat.add_argument(
        "--greedy", dest="temperature", action="store_const", const=0.0,
        help="always take the likeliest token",
    )  # fmt: skip
    parser.add_argument(
        "--top-p", type=float, action=Checked, check=_where(lambda share: 0 < share <= 1),
        default=1.0,
        help="sample among the likeliest tokens that together have this probability (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--top-k", type=int, action=Checked, check=_where(lambda tokens: tokens >= 0), default=0,
        help="sample among this many likeliest tokens (%(default)s: all)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, action=Checked, check=_where(lambda seed: 0 <= seed < 2**63),
        help="seed for sampling (a new one each time)",
    )  # fmt: skip
    parser.add_argument("--stop", metavar="TEXT", default="", help="stop before this text")


def _where(is_good: Callable[[Any], bool]) -> Callable[[str, Any], Any]:
    def check(name: str, value: Any) -> Any:
        if not is_good(value):
            raise UserError(f"{name} ({value}) is out of range")
        return value

    return check


def _file(name: str, text: str) -> str:
    """Accepts only a regular file, whose size is known."""
    path = argument(name, text)
    if not Path(path).is_file():
        problem = "must be a regular file" if Path(path).exists() else "no such file"
        raise UserError(f"{name} {path}: {problem}")
    return path


def _run(options: argparse.Namespace) -> None:
    from infini_ds.generation import generate

    asked = generate.GenerateOptions(
        options.prompt, options.prompt_file, options.chat, options.memory, options.max_new_tokens,
        options.temperature, options.top_p, options.top_k, options.seed, options.stop,
    )  # fmt: skip
    generate.run(options.directory, options.step, asked)
