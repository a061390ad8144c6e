"""The sections of validation datasets: `validation_dataset`, and `validation_dataset_NAME` for each further one."""

from __future__ import annotations

import re
from collections.abc import Iterable

from autofunc.errors import ConfigError, one_of

SECTION = "validation_dataset"

DEFAULT = "default"
"""How the dataset without a name is referred to."""

_NAMED = re.compile(rf"{SECTION}_([A-Za-z0-9]\w*)")


def is_validation(key: str) -> bool:
    """Return whether a key names such a section."""
    return key == SECTION or _NAMED.fullmatch(key) is not None


def measured_as(section: str, what: str) -> str:
    """Return a measure's name in `metrics.jsonl`: validation_loss, validation_NAME_loss."""
    return f"validation{section.removeprefix(SECTION)}_{what}"


def display_name(section: str) -> str:
    """Return a section's name in printed lines and curves: "validation", "validation NAME"."""
    return f"validation {_name(section)}".rstrip()


def leading(sections: Iterable[str], named: str | None) -> str | None:
    """Return the section whose loss decides for the run: the one named, else the one without a name, else the first.

    Raises:
        ConfigError: if no section has that name.
    """
    by_name = {_name(section) or DEFAULT: section for section in sections}
    if named is None:
        return by_name.get(DEFAULT) or next(iter(by_name.values()), None)
    if named not in by_name:
        raise ConfigError(f"no validation dataset is named {named!r}; {one_of(named, by_name)}")
    return by_name[named]


def _name(section: str) -> str:
    """Return what follows `validation_dataset_`, or an empty string."""
    return section.removeprefix(SECTION).removeprefix("_")
