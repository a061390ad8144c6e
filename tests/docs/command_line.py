"""Commands as pages show them, parsed by the command line without being run."""

from __future__ import annotations

from typing import Any

import typer

from autofunc.cli.main import app


def parsed(words: list[str]) -> Any:
    """The context of a command with its arguments parsed: `.params` are its options, `.args` keys of a configuration.

    Args:
        words: as typed, "autofunc" included.

    Raises:
        Exception: of the command line, for an unknown command or option, or a value it does not take.
    """
    context = typer.main.get_command(app).make_context("autofunc", words[1:])
    while hasattr(context.command, "resolve_command"):
        _, command, rest = context.command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(command.name, rest, parent=context)
    return context
