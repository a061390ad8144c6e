"""A section's keys as its target's arguments: check their names and types against the signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from autofunc.config.environment import FromEnvironment, read_environment
from autofunc.config.problems import all_at_once, check_type, unknown_key
from autofunc.errors import ConfigError, one_of

_PLAIN = (int, float, str, bool, None, NoneType)
_MADE_OF = (Union, UnionType, list, dict, Sequence, Mapping)


def check_arguments(
    target: Callable[..., Any], given: Mapping[str, Any], where: str, name: str, given_later: int | str = 0
) -> dict[str, Any]:
    """Compare arguments with the target's signature.

    Args:
        target: the callable.
        given: the keyword arguments.
        where: the section's name, for messages.
        name: the target's name, for messages.
        given_later: how many leading arguments the caller passes itself; or the name of the one argument it passes, the
            first if no argument has that name.

    Returns:
        The arguments. Values from environment variables become numbers unless the signature asks for text.

    Raises:
        ConfigError: for unknown arguments (with the nearest known ones), missing ones, and values that don't match a
            plain type annotation.
    """
    parameters = _parameters(target)
    if parameters is None:
        return {key: read_environment(value) for key, value in given.items()}
    by_name = {parameter.name: parameter for parameter in _left(parameters, given_later)}
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    known = [
        key
        for key, parameter in by_name.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    arguments, problems = {}, []
    for key, value in given.items():
        if key not in known:
            arguments[key] = read_environment(value)
            if not takes_any:
                near = f"{name} has no such argument; {one_of(key, known)}"
                problems += unknown_key([*where.split("."), key], value, near)
            continue
        kind = by_name[key].annotation
        arguments[key] = value.read(kind) if isinstance(value, FromEnvironment) else read_environment(value)
        is_default = arguments[key] is by_name[key].default
        if _is_plain(kind) and not is_default and not _is_made(value):
            problems += check_type(arguments[key], kind, f"{where}.{key}")
    missing = [key for key in known if by_name[key].default is inspect.Parameter.empty and key not in given]
    if missing:
        problems.append(f"missing key {where + '.' + missing[0]!r}: {name} needs {', '.join(missing)}")
    if problems:
        raise ConfigError(all_at_once(problems))
    return arguments


def _parameters(target: Callable[..., Any]) -> list[inspect.Parameter] | None:
    """Return a callable's parameters, with annotations evaluated if possible; None for a C function without signature."""
    try:
        plain = inspect.signature(target)
    except (TypeError, ValueError):
        return None
    try:
        return list(inspect.signature(target, eval_str=True).parameters.values())
    except Exception:  # annotations that only a type checker can resolve
        return list(plain.parameters.values())


def _left(parameters: list[inspect.Parameter], given_later: int | str) -> list[inspect.Parameter]:
    """Drop the parameters that the caller passes itself."""
    if isinstance(given_later, int):
        return parameters[given_later:]
    others = [parameter for parameter in parameters if parameter.name != given_later]
    return others if len(others) < len(parameters) else parameters[1:]


def _is_made(value: Any) -> bool:
    """Return whether a value is, or contains, a section to instantiate."""
    if isinstance(value, dict):
        return "_target_" in value or any(map(_is_made, value.values()))
    return isinstance(value, list) and any(map(_is_made, value))


def _is_plain(annotation: Any) -> bool:
    """Return whether a type is one a YAML file can hold, or composed of such types."""
    if annotation in _PLAIN or get_origin(annotation) is Literal:
        return True
    return get_origin(annotation) in _MADE_OF and all(_is_plain(part) for part in get_args(annotation))
