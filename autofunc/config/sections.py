"""The sections that name what is called: all of them are looked at before the first is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from autofunc.config.arguments import check_arguments
from autofunc.config.problems import all_at_once
from autofunc.config.schema import FinetuneConfig
from autofunc.config.target import resolve_target
from autofunc.errors import ConfigError

GIVEN_LATER: Mapping[str, int] = {"model": 0, "dataset": 0, "validation_dataset": 0, "optimizer": 1, "loss_fn": 2}
"""By section: how many leading arguments are not in the file."""

_KNOWN = ("autofunc.", "stages.", "torch.")


def check_targets(config: FinetuneConfig) -> None:
    """Import what the sections name, and compare their keys with what it takes. Nothing is called.

    Raises:
        ConfigError: listing every problem.
    """
    sections = {name: getattr(config, name) for name in GIVEN_LATER}
    problems = [line for name, section in sections.items() if section is not None for line in _problems(name, section)]
    if problems:
        raise ConfigError(all_at_once(problems))


def target_and_arguments(section: Mapping[str, Any], where: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What a section names, and its arguments.

    Raises:
        ConfigError: when there is no such thing, or it takes other arguments.
    """
    name = section["_target_"]
    target = resolve_target(name, f"{where}._target_")
    given = {key: value for key, value in section.items() if key != "_target_"}
    return target, check_arguments(target, given, where, name, GIVEN_LATER[where])


def problems_of_known(raw: Mapping[str, Any]) -> list[str]:
    """What is wrong with the sections of a raw configuration that name what comes with autofunc: no code of the user's."""
    found: list[str] = []
    for name in GIVEN_LATER:
        section = raw.get(name)
        if isinstance(section, Mapping) and str(section.get("_target_")).startswith(_KNOWN):
            found += _problems(name, section)
    return found


def _problems(name: str, section: Mapping[str, Any]) -> list[str]:
    try:
        target_and_arguments(section, name)
    except ConfigError as error:
        return str(error).splitlines()
    return []
