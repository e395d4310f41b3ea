"""The command line as a page: usage, arguments and options of every command, read from the program itself."""

from collections.abc import Iterator
from typing import Any

import typer

from flexkd.cli import app


def commands_page() -> str:
    """Every command in Markdown, in the order of `flexkd --help`."""
    group: Any = typer.main.get_command(app)
    return "\n\n".join(_command(name, command) for name, command in group.commands.items()) + "\n"


def _command(name: str, command: Any) -> str:
    parts = [f"## `flexkd {name}` {{ #{name} }}", command.help, f"```\n{_usage(name, command)}\n```"]
    rows = [_row(parameter) for parameter in command.params if not parameter.hidden]
    if rows:
        parts.append("\n".join(("| | default | |", "|---|---|---|", *rows)))
    return "\n\n".join(parts)


def _usage(name: str, command: Any) -> str:
    words = [_word(parameter) for parameter in command.params if not _is_option(parameter)]
    return " ".join(("flexkd", name, *words, "[OPTIONS]" if any(map(_is_option, command.params)) else "")).strip()


def _word(parameter: Any) -> str:
    """An argument as a usage line writes it."""
    name = parameter.metavar or parameter.name.upper()
    many = f"{name} ..." if parameter.nargs == -1 else name
    return many if parameter.required else f"[{many}]"


def _is_option(parameter: Any) -> bool:
    return bool(parameter.opts[0].startswith("-"))


def _row(parameter: Any) -> str:
    names = ", ".join(f"`{name}`" for name in _names(parameter))
    default = "required" if parameter.required else _default(parameter)
    return f"| {names} | {default} | {parameter.help} |"


def _names(parameter: Any) -> Iterator[str]:
    if not _is_option(parameter):
        yield _word(parameter)
        return
    takes_value = "" if getattr(parameter, "is_flag", False) else f" {parameter.metavar or parameter.name.upper()}"
    yield from (f"{name}{takes_value}" for name in parameter.opts)


def _default(parameter: Any) -> str:
    value = parameter.default
    return "" if value is None or value is False else f"`{value}`"
