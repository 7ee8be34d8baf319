"""The pages that people read, taken apart: code, links, headings, commands."""

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "launch/*.md", "tokenizer/*.md")
    for path in ROOT.glob(pattern)
)
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
_HEREDOC = re.compile(r"<<'(\w+)'\n.*?^\1$", re.DOTALL | re.MULTILINE)
_ARRAY = re.compile(r"^(\w+)=\((.*)\)$", re.MULTILINE)


class Code(NamedTuple):
    """A fenced block."""

    page: Path
    language: str
    text: str


def name_of(page: Path) -> str:
    """Its path in the repository, for the names of tests."""
    return page.relative_to(ROOT).as_posix()


def blocks(language: str) -> list[Code]:
    """All fenced blocks of a language, page by page."""
    return [
        Code(page, found[2], found[3])
        for page in PAGES
        for found in _FENCE.finditer(page.read_text())
        if found[2] == language
    ]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", page.read_text())


def inline_code(page: Path) -> list[str]:
    """What stands in backticks in a page's prose; one that goes over a line's end is joined."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]


def links(page: Path) -> list[str]:
    """Targets of a page's links and images that lie in the repository, as they are written.

    Left out is `../../actions/`, where GitHub has the workflows of whatever repository this is.
    """
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(page)))
    return [target for target in targets if not re.match(r"[a-z]+:|\.\./\.\./actions/", target)]


def anchors(page: Path) -> list[str]:
    """The anchors that GitHub gives to a page's headings."""
    found: list[str] = []
    times: Counter[str] = Counter()
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        found.append(f"{slug}-{times[slug]}" if times[slug] else slug)
        times[slug] += 1
    return found


def shell_commands(text: str) -> Iterator[list[str]]:
    """The simple commands of a shell block, as words; what stands in heredocs is left out."""
    text = _HEREDOC.sub("", text).replace("\\\n", " ")
    arrays = {name: shlex.split(words) for name, words in _ARRAY.findall(text)}
    for line in _ARRAY.sub("", text).splitlines():
        words = shlex.split(line, comments=True)
        command: list[str] = []
        for word in [*words, "|"]:
            if word in ("|", "&&"):
                if command:
                    yield command
                command = []
            elif word.startswith("${") and word.endswith("[@]}"):
                command += arrays[word[2:-4]]
            else:
                command.append(word)


def all_commands() -> list[tuple[Path, list[str]]]:
    """Every command that a page shows, in a block or in backticks."""
    commands = [
        (code.page, words) for code in blocks("bash") for words in shell_commands(code.text)
    ]
    for page in PAGES:
        for code in inline_code(page):
            if re.match(
                r"(infini-ds|make|pytest|bash|deepspeed|sbatch|torchrun|\.venv/bin/\S+) ", code
            ):
                commands += [(page, words) for words in shell_commands(code)]
    return commands
