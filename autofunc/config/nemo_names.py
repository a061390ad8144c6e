"""Names of NeMo AutoModel that configurations written for it use, and what they stand for here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autofunc.errors import one_of

_PACKAGE = "nemo_automodel"

RENAMED: Mapping[str, str] = {
    "build_gpt2_model": "stages.gpt2.build_gpt2_model",
    "HellaSwag": "autofunc.data.HellaSwag",
    "MaskedCrossEntropy": "autofunc.losses.causal_lm",
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

    renamed = visit(dict(raw), "")
    near = one_of(unknown[0].rpartition(".")[2] if unknown else "", RENAMED)
    return renamed, notes, [f"{', '.join(unknown)}, of NeMo AutoModel, has no name here; {near}"] if unknown else []
