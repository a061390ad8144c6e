"""C5: a `config` attribute that can be written to a file, as a registry of models requires."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from types import SimpleNamespace
from typing import Any

from autofunc.checks.subject import Subject
from autofunc.checks.verdict import Verdict
from autofunc.errors import in_brief


def check_config(subject: Subject, registry: bool) -> list[Verdict]:
    """Return the findings of C5.

    Args:
        subject: the checked module or model.
        registry: whether a registry will find the model; otherwise it does not need a config.
    """
    config = getattr(subject.checked, "config", None)
    missing = "there is no attribute 'config'; a dataclass or a dict is enough"
    problem = missing if config is None else _problem(config)
    if not problem:
        return [Verdict("C5", "pass", f"config ({type(config).__name__}) can be written as JSON and YAML")]
    if registry:
        return [Verdict("C5", "fail", problem, subject.where)]
    return [Verdict("C5", "skip", f"{problem}. Only a registry of models needs it")]


def _problem(config: Any) -> str:
    try:
        plain = _plain(config)
    except Exception as error:  # to_dict is the user's
        return f"config ({type(config).__name__}) cannot be read: {in_brief(error)}"
    if plain is None:
        return f"config is a {type(config).__name__}; expected a dict, a dataclass, a SimpleNamespace or to_dict()"
    try:
        json.dumps(plain)  # whatever JSON can hold, YAML can
    except (TypeError, ValueError) as error:
        return f"config ({type(config).__name__}) cannot be written as JSON or YAML: {error}"
    return ""


def _plain(config: Any) -> Any:
    if callable(getattr(config, "to_dict", None)):
        return config.to_dict()
    if isinstance(config, Mapping):
        return dict(config)
    if is_dataclass(config) and not isinstance(config, type):
        return asdict(config)
    return vars(config) if isinstance(config, SimpleNamespace) else None
