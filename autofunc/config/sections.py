"""Sections that name a callable: check all of them before the first is called."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from autofunc.config.arguments import check_arguments
from autofunc.config.problems import all_at_once
from autofunc.config.schema import FinetuneConfig
from autofunc.config.target import resolve_target
from autofunc.config.updates import OPTIMIZER_KEYS
from autofunc.config.validations import is_validation
from autofunc.errors import ConfigError

GIVEN_LATER: Mapping[str, int | str] = {
    "model": 0, "dataset": 0, "validation_dataset": 0, "optimizer": 1, "lr_scheduler": "optimizer", "loss_fn": 2,
    "metrics": 2,
}  # fmt: skip
"""By section: how many leading arguments are not in the file, or the name of the one that is not."""

_KNOWN = ("autofunc.", "stages.", "torch.")


def check_targets(config: FinetuneConfig) -> None:
    """Import what the sections name, and compare their keys with its signature. Nothing is called.

    Raises:
        ConfigError: listing every problem.
    """
    sections = {name: getattr(config, name) for name in GIVEN_LATER} | config.validations
    problems = [line for name, section in sections.items() for line in _problems(name, section)]
    if problems:
        raise ConfigError(all_at_once(problems))


def target_and_arguments(section: Mapping[str, Any], where: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return the callable a section names, and its arguments.

    Raises:
        ConfigError: if the name cannot be imported, or the callable does not take these arguments.
    """
    name = section["_target_"]
    target = resolve_target(name, f"{where}._target_")
    root = re.split(r"[.[]", where)[0]
    left_out = ("_target_", *OPTIMIZER_KEYS) if root == "optimizer" else ("_target_",)
    given = {key: value for key, value in section.items() if key not in left_out}
    return target, check_arguments(target, given, where, name, GIVEN_LATER.get(root, 0))


def problems_of_known(raw: Mapping[str, Any]) -> list[str]:
    """Return the problems of a raw configuration's sections that name autofunc's own callables; import no user code."""
    found: list[str] = []
    for name in [*GIVEN_LATER, *(name for name in raw if is_validation(name) and name not in GIVEN_LATER)]:
        for where, each in _each(name, raw.get(name)):
            if str(each.get("_target_")).startswith(_KNOWN):
                found += _problems(where, each)
    return found


def _each(name: str, section: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each section that names a target with its name: this one, those in a list, and schedulers in a scheduler."""
    if isinstance(section, list):
        for number, each in enumerate(section):
            yield from _each(f"{name}[{number}]", each)
    elif isinstance(section, Mapping) and "_target_" in section:
        yield name, section
        if name.startswith("lr_scheduler"):
            yield from _each(f"{name}.schedulers", section.get("schedulers"))
    elif name == "metrics" and isinstance(section, Mapping):
        for key, each in section.items():
            yield from _each(f"{name}.{key}", each)


def _problems(name: str, section: Any) -> list[str]:
    found: list[str] = []
    for where, each in _each(name, section):
        try:
            target_and_arguments(each, where)
        except ConfigError as error:
            found += str(error).splitlines()
    return found
