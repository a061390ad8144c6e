"""NeMo AutoModel's names in configurations written for it, and their equivalents here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from autofunc.config.validations import is_validation
from autofunc.errors import one_of

_PACKAGE = "nemo_automodel"
_NAME_TARGETS = ("model", "dataset", "optimizer", "loss_fn")
_OVERRIDES = "param_group_overrides"
_PLAIN_TOKENS = re.compile(r"\\\.|\.\*|\.|[\w-]")
_AS_GLOB = {"\\.": ".", ".*": "*", ".": "?"}

RENAMED: Mapping[str, str] = {
    "build_gpt2_model": "stages.gpt2.build_gpt2_model",
    "HellaSwag": "autofunc.data.HellaSwag",
    "ColumnMappedTextInstructionDataset": "autofunc.data.ColumnMappedTextInstructionDataset",
    "NanogptDataset": "autofunc.data.TokenFiles",
    "MockIterableDataset": "autofunc.data.MockDataset",
    "ChatDataset": "autofunc.data.ChatDataset",
    "MaskedCrossEntropy": "autofunc.losses.causal_lm",
    "FusedLinearCrossEntropy": "autofunc.losses.chunked_causal_lm",
    "NeMoAutoModelForCausalLM.from_pretrained": "autofunc.AutoModel.from_pretrained",
    "NeMoAutoModelForCausalLM.from_config": "autofunc.AutoModel.from_config",
    "NeMoAutoModelForSeq2SeqLM.from_pretrained": "autofunc.AutoModel.from_pretrained",
    "NeMoAutoModelForSeq2SeqLM.from_config": "autofunc.AutoModel.from_config",
}
"""Keyed by the end of the NeMo name, because modules moved between its versions."""


def with_new_names(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
    """Replace NeMo AutoModel's targets by their equivalents.

    Returns:
        The configuration, a note for each replaced name, and the problems: names without an equivalent.
    """
    notes: list[str] = []
    unknown: list[str] = []

    def visit(node: Any, where: str) -> Any:
        if isinstance(node, Mapping):
            return {key: visit(value, f"{where}.{key}" if where else str(key)) for key, value in node.items()}
        is_target = where.rpartition(".")[2] == "_target_" and isinstance(node, str)
        if not is_target or node.partition(".")[0] != _PACKAGE:
            return node
        found = next((new for end, new in RENAMED.items() if node.endswith(f".{end}")), None)
        if found is None:
            unknown.append(f"{where}: {node!r}")
            return node
        notes.append(f"{where}: {node} is {found} here")
        return found

    # problems of other sections are reported by `other_tools`
    known = {name: value for name, value in raw.items() if name in _NAME_TARGETS or is_validation(name)}
    renamed = {**raw, **visit(known, "")}
    if notes or unknown:
        renamed = _without_none(renamed)
    near = one_of(unknown[0].rpartition(".")[2] if unknown else "", RENAMED)
    problems = [f"{', '.join(unknown)} of NeMo AutoModel has no equivalent here; {near}"] if unknown else []
    return renamed, notes, problems + _with_param_groups(renamed, notes)


def _without_none(node: Any) -> Any:
    """Replace the text `none` by null, which it means in NeMo's files."""
    if isinstance(node, Mapping):
        return {key: _without_none(value) for key, value in node.items()}
    return None if isinstance(node, str) and node in ("none", "None") else node


def _with_param_groups(raw: dict[str, Any], notes: list[str]) -> list[str]:
    """Turn `optimizer.param_group_overrides`, regular expressions, into `optimizer.param_groups`; return the problems."""
    section = raw.get("optimizer")
    given = section.get(_OVERRIDES) if isinstance(section, dict) else None
    if not isinstance(section, dict) or not isinstance(given, list) or not all(isinstance(each, dict) for each in given):
        return []
    if "param_groups" in section:
        return [f"optimizer has both param_groups and {_OVERRIDES}; give one of them"]
    groups: list[dict[str, Any]] = []
    for number, group in enumerate(given):
        where = f"optimizer.{_OVERRIDES}[{number}].pattern"
        globs = _globs(group.get("pattern"))
        if not globs:
            return [
                f"{where}: {group.get('pattern')!r} cannot be written as shell-style patterns, which "
                "optimizer.param_groups takes, such as '*.bias'"
            ]
        notes.append(f"{where}: the regular expression {group['pattern']!r} becomes {' and '.join(globs)} here")
        groups += [{**group, "pattern": glob} for glob in globs]
    del section[_OVERRIDES]
    section["param_groups"] = groups
    return []


def _globs(pattern: Any) -> list[str]:
    """Return shell-style patterns for the paths that a regular expression finds; empty if it can't be written as such."""
    found = []
    for part in pattern.split("|") if isinstance(pattern, str) else ():
        body = part.removeprefix("^").removesuffix("$")
        tokens = _PLAIN_TOKENS.findall(body)
        if not body or "".join(tokens) != body:
            return []
        glob = "".join(_AS_GLOB.get(token, token) for token in tokens)
        found.append(("" if part.startswith("^") else "*") + glob + ("" if part.endswith("$") else "*"))
    return found
