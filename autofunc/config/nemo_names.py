"""Names of NeMo AutoModel that configurations written for it use, and what they stand for here."""

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
"""By the end of the old name: modules have moved between its versions."""


def with_new_names(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
    """A configuration with targets by their names here.

    Returns:
        It, a line for each name that was another, and what is wrong: names that have none here.
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

    # other sections are told as such
    known = {name: value for name, value in raw.items() if name in _NAME_TARGETS or is_validation(name)}
    renamed = {**raw, **visit(known, "")}
    if notes or unknown:
        renamed = _without_none(renamed)
    near = one_of(unknown[0].rpartition(".")[2] if unknown else "", RENAMED)
    problems = [f"{', '.join(unknown)}, of NeMo AutoModel, has no name here; {near}"] if unknown else []
    return renamed, notes, problems + _with_param_groups(renamed, notes)


def _without_none(node: Any) -> Any:
    """The text `none` is null in such files."""
    if isinstance(node, Mapping):
        return {key: _without_none(value) for key, value in node.items()}
    return None if isinstance(node, str) and node in ("none", "None") else node


def _with_param_groups(raw: dict[str, Any], notes: list[str]) -> list[str]:
    """Make `optimizer.param_group_overrides`, whose patterns are searched for, `optimizer.param_groups`; what is wrong."""
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
                f"{where}: {group.get('pattern')!r} cannot be written as shell-style patterns, which are what "
                "optimizer.param_groups takes, such as '*.bias'"
            ]
        notes.append(f"{where}: {group['pattern']!r}, searched for in paths, is {' or '.join(globs)} here")
        groups += [{**group, "pattern": glob} for glob in globs]
    del section[_OVERRIDES]
    section["param_groups"] = groups
    return []


def _globs(pattern: Any) -> list[str]:
    """Shell-style patterns of the paths in which a regular expression is found; none where there are no such."""
    found = []
    for part in pattern.split("|") if isinstance(pattern, str) else ():
        body = part.removeprefix("^").removesuffix("$")
        tokens = _PLAIN_TOKENS.findall(body)
        if not body or "".join(tokens) != body:
            return []
        glob = "".join(_AS_GLOB.get(token, token) for token in tokens)
        found.append(("" if part.startswith("^") else "*") + glob + ("" if part.endswith("$") else "*"))
    return found
