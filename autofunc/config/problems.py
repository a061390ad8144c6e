"""Problems of a configuration, in words: one line each, all reported at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError

from autofunc.config.environment import FromEnvironment
from autofunc.config.other_tools import explained
from autofunc.config.validations import is_validation
from autofunc.errors import one_of
from autofunc.shown import quoted

MOST = 14
"""The number of problems reported at once."""

HAS_TARGET, HAS_KEYS, IS_LIST = "(_target_)", "(keys)", "(list)"
"""Markers that pydantic puts into a problem's location when a section is one of several kinds; they are not keys."""

_A_SECTION = "expected a section with keys"
_TYPES = {"model_type": _A_SECTION, "dict_type": _A_SECTION, "too_short": "expected one or more, or to leave it out"}
_NUMBERS = ("int_type", "float_type", "bool_type")


def all_at_once(problems: Iterable[str]) -> str:
    """Join the distinct problems into one text, at most `MOST` lines."""
    lines = [line for problem in dict.fromkeys(problems) for line in problem.splitlines()]
    left = len(lines) - MOST
    return "\n".join([*lines[:MOST], f"and {left} more"] if left > 1 else lines)


def in_words(error: ValidationError, section: type[BaseModel]) -> list[str]:
    """Describe the problems pydantic found in a section and below it.

    For a key with several possible types pydantic reports a problem per type; here they are one.
    """
    found: dict[tuple[str, str], list[str]] = {}
    told: list[str] = []
    for detail in error.errors():
        location = [str(part) for part in detail["loc"] if part not in (HAS_TARGET, HAS_KEYS, IS_LIST)]
        if detail["type"] == "extra_forbidden":
            known = [*_keys_below(section, location[:-1])]
            told += unknown_key(location, detail["input"], one_of(location[-1], known))
        elif detail["type"] == "missing":
            kind = "section" if len(location) == 1 else "key"
            told.append(f"missing {kind} {_path(section, location)!r}")
        else:
            given, path = detail["input"], _path(section, location)
            found.setdefault((path, _got(detail, given)), []).append(_expected(detail, given))
    return [*told, *(f"{path}: {_joined(expected)}; got {given}" for (path, given), expected in found.items())]


def unknown_key(location: list[str], given: Any, hint: str) -> list[str]:
    """Describe an unknown key, one line per key of a section: its equivalent if another tool has it, else `hint`."""
    lines = explained(location, given)
    return lines or [f"unknown key {quoted('.'.join(location))}: {hint}"]


def check_type(value: Any, annotation: Any, where: str) -> list[str]:
    """Describe what is wrong with an argument's value, given the argument's plain type annotation."""
    try:
        TypeAdapter(annotation, config={"strict": True}).validate_python(value)
    except ValidationError as error:
        found = [_expected(detail, detail["input"]) for detail in error.errors()]
        details = error.errors()
        return [f"{where}: {_joined(found)}; got {_got(details[0], details[0]['input'])}"]
    return []


def _expected(detail: Any, given: Any) -> str:
    if given is None and detail["type"] != "value_error":
        return "has no value: leave the key out, or give it one"
    message = _TYPES.get(detail["type"]) or str(detail["msg"]).removeprefix("Value error, ")
    return f"{message[0].lower()}{message[1:]}"


def _got(detail: Any, given: Any) -> str:
    hint = ""
    if isinstance(given, str) and detail["type"] in _NUMBERS and not isinstance(FromEnvironment(given).read(), str):
        hint = ", a string: leave out the quotes; for an environment variable write ${oc.decode:${oc.env:NAME}}"
    return quoted(given) + hint


def _joined(expected: list[str]) -> str:
    """Join alternatives, such as `input should be a valid list or a valid integer`."""
    first, *others = dict.fromkeys(expected)
    return " or ".join([first, *(each.removeprefix("input should be ") for each in others)])


def _path(section: type[BaseModel], location: list[str]) -> str:
    """Return the dotted key: for a field of several types pydantic appends the name of the type that did not fit."""
    path: list[str] = []
    shown = ""
    known = [*section.model_fields, *filter(is_validation, location[:1])]
    for part in location:
        if part.isdigit() and path:
            shown += f"[{part}]"
        elif part in known:
            path.append(part)
            shown = f"{shown}.{part}" if shown else part
            known = _keys_below(section, path)
        else:
            break
    return shown


def _keys_below(section: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        field = section.model_fields.get(part)
        kind = field.annotation if field is not None else None
        kinds = {each for each in _members(kind) if isinstance(each, type) and issubclass(each, BaseModel)}
        if not kinds:
            return []
        (section,) = kinds
    return list(section.model_fields)


def _members(kind: Any) -> Iterator[Any]:
    """Yield a type, the types it is composed of, and the section that declares a mapping's keys."""
    yield getattr(kind, "section", kind)
    for part in get_args(kind):
        yield from _members(part)
