"""The sections of validation datasets: `validation_dataset`, and `validation_dataset_NAME` for each further one."""

from __future__ import annotations

import re
from collections.abc import Iterable

from autofunc.errors import ConfigError, one_of

SECTION = "validation_dataset"

DEFAULT = "default"
"""What the dataset without a name is called where one is named."""

_NAMED = re.compile(rf"{SECTION}_([A-Za-z0-9]\w*)")


def is_validation(key: str) -> bool:
    """Whether a key is such a section."""
    return key == SECTION or _NAMED.fullmatch(key) is not None


def measured_as(section: str, what: str) -> str:
    """What is measured on a section's dataset, by its name in `metrics.jsonl`: validation_loss, validation_NAME_loss."""
    return f"validation{section.removeprefix(SECTION)}_{what}"


def spoken(section: str) -> str:
    """A section as lines and curves call it: "validation", "validation NAME"."""
    return f"validation {_name(section)}".rstrip()


def leading(sections: Iterable[str], named: str | None) -> str | None:
    """The section whose loss is that of a run: the one that is named, else the one without a name, else the first.

    Raises:
        ConfigError: where the one that is named is not there.
    """
    by_name = {_name(section) or DEFAULT: section for section in sections}
    if named is None:
        return by_name.get(DEFAULT) or next(iter(by_name.values()), None)
    if named not in by_name:
        raise ConfigError(f"{named!r} is no name of a validation dataset; {one_of(named, by_name)}")
    return by_name[named]


def _name(section: str) -> str:
    """What follows `validation_dataset_`; empty where nothing does."""
    return section.removeprefix(SECTION).removeprefix("_")
