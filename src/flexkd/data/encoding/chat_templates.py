"""Chat templates, which are untrusted programs: rendered in a sandbox, within limits, and always for the same date."""

import datetime
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from types import FrameType
from typing import Any, Final

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flexkd.errors import DataError, RecipeError

SECONDS: Final = 5.0
"""Longest time in seconds that one guarded row may take; real templates need less than a thousandth of it."""

MAXIMUM_OUTPUT: Final = 1_000_000
"""Most characters that a template may write, beyond four times the text of the turns."""

_LARGEST_PRODUCT: Final = 100_000
_DIRECTIVES: Final = "aAbBdefFGHIjmMpSTuUVwWxXyYzZcD"
_DATE_DIRECTIVE: Final = re.compile(f"%-?[{_DIRECTIVES}]")
_CLOCK: Final = "strftime_now"
_SET_BY_EVERY_CALL: Final = ("messages", "tools", "documents", "add_generation_prompt")


class _Generation(Extension):
    """`{% generation %}` marks the answers of a conversation for other trainers; here its content is simply written."""

    tags: Final = {"generation"}  # type: ignore[misc]

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    def _written(self, caller: Macro) -> str:
        return str(caller())


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which also refuses products that would fill the memory."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = [abs(value) if isinstance(value, int | float) else len(value) for value in (left, right)]
        is_text = any(not isinstance(value, int | float) for value in (left, right))
        if (is_text and numbers[0] * numbers[1] > _LARGEST_PRODUCT) or (operator == "**" and max(numbers) > 1000):
            raise SecurityError("a product that would fill the memory")
        return super().call_binop(context, operator, left, right)


def _refuse(message: object) -> None:
    raise TemplateError(str(message))


def _to_json(
    value: object, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=32)
def compiled_template(source: str) -> Template:
    """A template compiled with what transformers provides: block trimming, loop controls, tojson, raise_exception.

    Raises:
        DataError: The source is not a valid Jinja template.
    """
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    # Jinja's own filter writes HTML.
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    try:
        return environment.from_string(source)
    except (TemplateError, RecursionError) as error:
        raise DataError(f"is no Jinja template ({_in_words(error)})") from error


def asks_for_date(source: str) -> bool:
    """Whether a template writes today's date; the template of a saved student has a fixed date instead."""
    return _CLOCK in source and f"macro {_CLOCK}(" not in source


def with_date(source: str, date: datetime.date) -> str:
    """The template with a fixed date: its clock becomes a macro at its head, which any Jinja engine understands.

    The date must be in the template itself rather than in each call: a student is served from its folder alone, by
    engines that pass no date.
    """
    if not asks_for_date(source):
        return source
    moment = datetime.datetime.combine(date, datetime.time())
    texts = {directive: moment.strftime(directive) for directive in sorted(set(_DATE_DIRECTIVE.findall(source)))}
    replaced = "".join(f" | replace({json.dumps(directive)}, {json.dumps(text)})" for directive, text in texts.items())
    # The line break after a block is not rendered, so that the template itself still begins a line.
    return f"{{%- macro {_CLOCK}(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n{source}"


def with_values(source: str, values: Mapping[str, object]) -> str:
    """The template with variables set at its head, such as enable_thinking, for every engine that renders it.

    Raises:
        RecipeError: A name is not a valid variable, or is set by every call.
    """
    for name in values:
        if not name.isidentifier() or name in _SET_BY_EVERY_CALL:
            raise RecipeError(
                f"data.chat_variables: {name!r} is no variable that a chat template leaves to its user. Name one, as"
                " enable_thinking."
            )
    head = "".join(f"{{%- set {name} = {json.dumps(value)} %}}\n" for name, value in values.items())
    return source if source.startswith(head) else head + source


def render(
    source: str,
    messages: Sequence[Mapping[str, str]],
    special_tokens: Mapping[str, str],
    *,
    add_generation_prompt: bool,
    guarded: bool = False,
) -> str:
    """What a template writes for a conversation, exactly as `apply_chat_template` renders it.

    Args:
        source: The template.
        messages: Turns as mappings with role and content.
        special_tokens: By name, such as bos_token.
        add_generation_prompt: Whether the last turn is still to be answered (`add_generation_prompt`).
        guarded: Whether to stop after `SECONDS`; slower, so only for the first row of each kind.

    Raises:
        DataError: The template fails, refuses the turns, writes too much or takes too long. The message gives the
            reason; the caller adds the row.
    """
    template = compiled_template(source)
    limit = MAXIMUM_OUTPUT + 4 * sum(len(turn["content"]) for turn in messages)
    values = {**special_tokens, "messages": [dict(turn) for turn in messages], "tools": None, "documents": None}
    pieces: list[str] = []
    length = 0
    try:
        with _deadline(SECONDS if guarded else None):
            for piece in template.generate(**values, add_generation_prompt=add_generation_prompt):
                pieces.append(piece)
                length += len(piece)
                if length > limit:
                    raise DataError(f"writes more than {limit:,} characters")
    except DataError:
        raise
    except Exception as error:  # an untrusted program may raise anything
        roles = ", ".join(str(turn["role"]) for turn in messages)
        does = "refuses" if type(error) is TemplateError else "cannot write"
        raise DataError(f"{does} the turns {roles} ({_in_words(error)})") from error
    return "".join(pieces)


def _in_words(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return " ".join(text.split())[:200]


@contextmanager
def _deadline(seconds: float | None) -> Iterator[None]:
    """Stop Python code after some seconds, on any thread; the trace function of a debugger is restored."""
    if seconds is None:
        yield
        return
    end = time.monotonic() + seconds

    def watch(frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
        if time.monotonic() > end:
            raise DataError(f"takes longer than {seconds:g} seconds")
        return watch

    previous_trace = sys.gettrace()
    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(previous_trace)
