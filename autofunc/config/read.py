"""Read a YAML file and overrides into nested dicts, and into a checked configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autofunc.config.environment import mark_environment
from autofunc.config.nemo_names import with_new_names
from autofunc.config.problems import all_at_once
from autofunc.config.schema import FinetuneConfig, parse_config
from autofunc.config.sections import problems_of_known
from autofunc.config.yaml_text import in_one_line, load_yaml, read_text
from autofunc.errors import ConfigError
from autofunc.shown import quoted


def read_config(
    path: str | Path, overrides: Sequence[str] = (), *, look_into_targets: bool = True
) -> tuple[FinetuneConfig, list[str]]:
    """Read and check a file; return the configuration and notes for the user on how it was read.

    Nothing the file names is imported or called. If the file is wrong anyway, the signatures of autofunc's own targets
    are checked too, so that all problems are reported at once.

    Args:
        path: the YAML file.
        overrides: see `load_config`.
        look_into_targets: allow that check, which imports torch.

    Raises:
        ConfigError: listing every problem.
    """
    raw, notes, problems = with_new_names(load_config(path, overrides))
    try:
        config = parse_config(raw)
    except ConfigError as error:
        problems += str(error).splitlines()
    if not problems:
        return config, notes
    raise ConfigError(all_at_once([*problems, *(problems_of_known(raw) if look_into_targets else ())]))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML file, apply overrides, resolve `${...}`.

    Args:
        path: the file.
        overrides: `--a.b.c VALUE`, `--a.b.c=VALUE` or `a.b.c=VALUE`; values are read as YAML.

    Raises:
        ConfigError: if the file is missing or is not a YAML mapping, or an override cannot be read.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = Path(path)
    if not path.is_file():
        near = sorted(str(other) for other in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        raise ConfigError(f"there is no file {quoted(str(path))}" + (f"; found {', '.join(near[:8])}" if near else ""))
    text = read_text(path)
    try:
        config = load_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    for key, value in _pairs(overrides):
        given = load_yaml(value, key)
        try:
            before = OmegaConf.select(config, key, throw_on_resolution_failure=False)
            OmegaConf.update(config, key, given, merge=isinstance(given, dict) and OmegaConf.is_dict(before))
        except OmegaConfBaseException as error:
            raise ConfigError(f"override {key}={quoted(value)}: {in_one_line(error)}") from error
    try:
        resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(in_one_line(error)) from error
    _check_names(resolved, "")
    marked: dict[str, Any] = mark_environment(OmegaConf.to_container(config, resolve=False), resolved)
    return marked


def _check_names(node: Any, where: str) -> None:
    if isinstance(node, dict):
        for name, value in node.items():
            if not isinstance(name, str):
                at = f" of {where}" if where else ""
                raise ConfigError(f"the key {name!r}{at} is {type(name).__name__}, not text; put it in quotes")
            _check_names(value, f"{where}.{name}" if where else name)
    elif isinstance(node, list):
        for number, value in enumerate(node):
            _check_names(value, f"{where}[{number}]")


def _pairs(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """Pair up keys and values given in any of the three forms."""
    pairs, words = [], list(overrides)
    while words:
        word = words.pop(0)
        key = word.removeprefix("--")
        if "=" in key:
            key, value = key.split("=", 1)
        elif word.startswith("--") and words and not words[0].startswith("--"):
            value = words.pop(0)
        else:
            raise ConfigError(f"override {quoted(word)} has no value; write '--a.b.c VALUE' or 'a.b.c=VALUE'")
        if not key or not all(key.split(".")):
            raise ConfigError(f"override {word!r}: {key!r} is not a key such as 'step_scheduler.max_steps'")
        pairs.append((key, value))
    return pairs
