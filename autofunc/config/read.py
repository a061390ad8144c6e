"""From a YAML file and overrides to plain nested dicts, and to a checked configuration."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from autofunc.config.nemo_names import with_new_names
from autofunc.config.schema import FinetuneConfig, parse_config
from autofunc.errors import ConfigError


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> tuple[FinetuneConfig, list[str]]:
    """Read and check a file; returns it with what the user should know about how it was read.

    Args:
        path: the YAML file.
        overrides: see `load_config`.

    Raises:
        ConfigError: listing every problem.
    """
    raw, notes = with_new_names(load_config(path, overrides))
    return parse_config(raw), notes


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML file, apply overrides, resolve `${...}`.

    Args:
        path: the file.
        overrides: `--a.b.c VALUE`, `--a.b.c=VALUE` or `a.b.c=VALUE`; values are read as YAML.

    Raises:
        ConfigError: when the file is missing, is no YAML mapping, or an override cannot be read.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = Path(path)
    if not path.is_file():
        near = sorted(str(other) for other in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        raise ConfigError(f"there is no file {str(path)!r}" + (f"; found {', '.join(near[:8])}" if near else ""))
    try:
        config = OmegaConf.load(StringIO(_text(path)))
        if not OmegaConf.is_dict(config):
            raise ConfigError(f"{path} is not a mapping of sections; expected keys such as model:, dataset:, optimizer:")
        for key, value in _pairs(overrides):
            OmegaConf.update(config, key, _value(key, value), merge=True)
        resolved = OmegaConf.to_container(config, resolve=True)
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _text(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 where its first bytes say so.

    Raises:
        ConfigError: when it cannot be read, or is in another encoding.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path} is no {error.encoding} text (line {line}: {error.reason}); save it as UTF-8") from error


def _value(key: str, text: str) -> Any:
    """The value of an override, read as YAML."""
    from omegaconf import OmegaConf
    from yaml import YAMLError

    try:
        return OmegaConf.create(f"value: {text}").value
    except YAMLError as error:
        raise ConfigError(f"override {key}={text!r} is not YAML; put it in quotes inside quotes: '\"{text}\"'") from error


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
            raise ConfigError(f"override {word!r} has no value; write '--a.b.c VALUE' or 'a.b.c=VALUE'")
        if not key or not all(key.split(".")):
            raise ConfigError(f"override {word!r}: {key!r} is not a key such as 'step_scheduler.max_steps'")
        pairs.append((key, value))
    return pairs
