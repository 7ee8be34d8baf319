"""Writes conversations as text with a chat template, and finds the assistant's parts of it.

A template is rendered as transformers' `apply_chat_template` does. Where the template marks what
the assistant writes (`{% generation %}`), the marks count. Otherwise an assistant's turn is what
the template writes for its message after the prompt for it: the conversation up to there, rendered
with `add_generation_prompt`.
"""

import itertools
import json
import re
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from infini_ds.config import DataConfig
from infini_ds.data.tokenizer import configured_tokenizer
from infini_ds.data.tokenizer_base import Tokenizer
from infini_ds.errors import UserError
from infini_ds.system.causes import one_line

# Noncharacters that stand around what the assistant writes, until they are taken out.
_BEGIN, _END = "\ufdd0", "\ufdd1"
_MARKS = re.compile(f"[{_BEGIN}{_END}]")
_LONGEST_REASON = 100
# Roles in conversations of ShareGPT's form, which have `from` and `value`.
_ROLES = {"human": "user", "gpt": "assistant"}


class Unusable(ValueError):
    """A conversation that cannot be trained on; the message is the reason, for `Skipped`."""


class Template:
    """A tokenizer's chat template.

    Args:
        where: names the template in messages.

    Raises:
        UserError: it cannot be parsed.
    """

    def __init__(self, tokenizer: Tokenizer, where: str):
        environment, source = _environment(), tokenizer.chat_template
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"{where} cannot be parsed ({one_line(error)})") from None
        self.marks_turns = _marks_turns(environment, source)
        self._names = tokenizer.template_names

    def written(self, messages: list[dict[str, Any]], prompt: bool = False) -> str:
        """Writes messages as text, with `prompt` up to where the assistant is to go on.

        Raises:
            Unusable: the template refuses them, or the text is not UTF-8.
        """
        try:
            text = self._template.render(
                **self._names,
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=prompt,
            )
            text.encode()
        except UnicodeEncodeError:
            raise Unusable("invalid UTF-8") from None
        except Exception as error:  # a template may raise anything
            reason = one_line(error)[:_LONGEST_REASON]
            raise Unusable(f"the chat template refuses it ({reason})") from None
        return text


class Chat:
    """Turns lists of messages into texts, whose parts have weight 1 where the assistant writes.

    Raises:
        UserError: there is no chat template, or it is none.
    """

    def __init__(self, config: DataConfig):
        settings = config.tokenizer
        tokenizer = configured_tokenizer(settings)
        if not tokenizer.chat_template:
            has = f"{settings.model} has none beside it" if settings.model else "bytes have none"
            raise UserError(
                "data.tokenizer.chat_template: must name a file with a chat template for "
                f"data.messages_field, as {has}"
            )
        own = f"model {settings.model}: its chat template"
        where = f"chat_template {settings.chat_template}:" if settings.chat_template else own
        self._template = Template(tokenizer, f"data.tokenizer.{where}")
        self._eos = tokenizer.template_names["eos_token"]
        special = [*tokenizer.special_tokens, _BEGIN, _END]
        self._special = re.compile("|".join(map(re.escape, special)))

    def written(self, value: Any) -> tuple[str, list[tuple[int, float]]]:
        """Writes a record's messages as text, and divides it into parts: (characters, weight).

        White space behind a final EOS is left out, since EOS ends a document.

        Args:
            value: a list of {"role", "content"} or {"from", "value"}; other fields are handed to
                the template.

        Raises:
            Unusable: the value is something else, or the assistant's part cannot be told for sure.
        """
        messages = _messages(value)
        if any(self._special.search(text) for text in _texts(messages)):
            raise Unusable("content holds a special token")
        text = self._template.written(messages)
        if self._template.marks_turns:
            text, turns = _unmarked(text)
        else:
            turns = self._turns(messages, text)
        if text.rstrip().endswith(self._eos):
            text = text.rstrip()
        if not text:
            raise Unusable("empty")
        if not any(begin < min(end, len(text)) for begin, end in turns):
            raise Unusable("no turn of the assistant")
        return text, list(_parts(turns, len(text)))

    def _turns(self, messages: list[dict[str, Any]], text: str) -> list[tuple[int, int]]:
        """Finds where the assistant's turns begin and end in the text of all messages."""
        turns = []
        at = 0
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            try:
                before = self._template.written(messages[:i], prompt=True)
                after = self._template.written(messages[: i + 1])
            except Unusable:
                before, after = text, ""
            if not (at <= len(before) and after.startswith(before) and text.startswith(after)):
                raise Unusable("the chat template does not show where the assistant's turns are")
            at = len(after)
            turns.append((len(before), at))
        return turns


def _marks_turns(environment: jinja2.Environment, source: str) -> bool:
    """Returns whether a template has blocks for what the assistant writes, outside of comments."""
    words = [word for _, kind, word in environment.lex(source) if kind != "whitespace"]
    return any(
        word == "generation" and before in ("{%", "{%-", "{%+")
        for before, word in itertools.pairwise(words)
    )


def _messages(value: Any) -> list[dict[str, Any]]:
    """Checks the messages, and drops their empty fields as transformers does."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise Unusable("field is not a list of messages")
    if not value:
        raise Unusable("empty")
    messages = []
    for message in value:
        if "role" not in message and isinstance(message.get("from"), str):
            role = _ROLES.get(message["from"], message["from"])
            message = {"role": role, "content": message.get("value")}
        message = {name: field for name, field in message.items() if field is not None}
        if not isinstance(message.get("role"), str):
            raise Unusable("a message has no role")
        if not isinstance(message.get("content"), str):
            raise Unusable("the content of a message is not text")
        messages.append(message)
    return messages


def _texts(value: Any) -> Iterator[str]:
    """Yields every text in a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _unmarked(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Takes the marks out of a text, and returns it with the places that they enclosed."""
    parts = _MARKS.split(text)
    turns = []
    at = 0
    for i, part in enumerate(parts):
        if i % 2:
            turns.append((at, at + len(part)))
        at += len(part)
    return "".join(parts), turns


def _parts(turns: list[tuple[int, int]], length: int) -> Iterator[tuple[int, float]]:
    """Divides a text of a length into the assistant's turns and what lies between them."""
    at = 0
    for begin, end in turns:
        begin, end = min(begin, length), min(end, length)
        yield begin - at, 0.0
        yield end - begin, 1.0
        at = end
    if at < length:
        yield length - at, 0.0


class _Generation(Extension):
    """The block `{% generation %}`, which marks what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return _BEGIN + _MARKS.sub("", caller()) + _END


def _environment() -> jinja2.Environment:
    """Makes the environment that chat templates are written for."""
    now = datetime.now()  # the same in all of a conversation

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def as_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = as_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = now.strftime
    return environment
