"""From a file to a checked configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from autofunc.config.load import load_config
from autofunc.config.renamed import with_new_names
from autofunc.config.schema import FinetuneConfig, parse_config


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
