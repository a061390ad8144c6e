"""Writing adapters in PEFT's format: a folder with adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from autofunc import tree
from autofunc.adapters.adapter import A, B, factor_path, part_of
from autofunc.adapters.model import AdaptedModel, require_adapted
from autofunc.adapters.names import names_outside
from autofunc.errors import ModelError, one_of
from autofunc.model import Model

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
ADAPTER_FILES = (CONFIG, WEIGHTS)
"""The files of an adapter's folder."""


def save_adapter(model: Model, params: tree.Nested, folder: str | Path, base: str | None = None) -> Path:
    """Write the factors and the fully trained parts in PEFT's format: `peft.PeftModel.from_pretrained` loads them.

    Names are those of the captured module, or of the transformers model that the base corresponds to. If that model fuses
    or transposes an adapted weight, names are the base's own, which only `load_adapter` reads; use `merge_lora` then.

    Args:
        model: returned by `lora`.
        params: its full tree, or its trainable part; on several processes `pipe.gather(params)`.
        folder: created if missing.
        base: the base model's name in adapter_config.json; by default the name or path in the base's config.

    Returns:
        The folder.

    Raises:
        ModelError: for a model without adapters, and for missing parameters.

    Example:
        af.save_adapter(model, params, "runs/mine/adapter")
    """
    adapted = require_adapted(model, "save_adapter")
    flat, names = tree.flatten(params), _names(adapted)
    missing = [path for path in names if path not in flat]
    if missing:
        raise ModelError(f"params have no {missing[0]!r}; give the full tree (pipe.gather); {one_of(missing[0], flat)}")
    leaves = {PREFIX + name: flat[path].detach().cpu().clone().contiguous() for path, name in names.items()}
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(leaves, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(_config(adapted, base), indent=2, sort_keys=True) + "\n")
    return folder


def _outside(model: AdaptedModel) -> Mapping[str, str]:
    """Return PEFT's names of the adapted weights and the fully trained parameters, by path."""
    return names_outside(model.base, [*model.plan, *model.saved])


def _names(model: AdaptedModel) -> dict[str, str]:
    """Return the names of the tensors that PEFT stores, without the prefix, by path."""
    outside = _outside(model)
    factors = {factor_path(path, name): factor_path(outside[path], name) for path in model.plan for name in (A, B)}
    return {**factors, **{path: outside[path] for path in model.saved}}


def _config(model: AdaptedModel, base: str | None) -> dict[str, Any]:
    outside, adapter = _outside(model), next(iter(model.plan.values()))
    saved = sorted({outside[path].rpartition(".")[0] for path in model.saved})
    ranks = {part_of(outside[path]): each.size.rank for path, each in model.plan.items()}
    name = _architecture(model)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if name.endswith(("ForCausalLM", "LMHeadModel")) else None,
        "base_model_name_or_path": base or getattr(model.config, "_name_or_path", None) or None,
        "inference_mode": True,
        "bias": "none",
        "r": adapter.size.rank,
        "rank_pattern": {part: rank for part, rank in ranks.items() if rank != adapter.size.rank},
        "lora_alpha": adapter.size.alpha,
        "lora_dropout": adapter.size.dropout,
        "use_rslora": adapter.size.use_rslora,
        "fan_in_fan_out": all(each.is_in_out for each in model.plan.values()),
        "target_modules": sorted(ranks),
        "modules_to_save": saved or None,
    }


def _architecture(model: AdaptedModel) -> str:
    """Return the class in transformers if known, else the model's title."""
    if model.base.in_transformers is None:
        return model.title
    leaves = {path: leaf for path, leaf in model.base.spec.items() if model.base.canonical(path) == path}
    values: Mapping[str, Any] = model.base.in_transformers(leaves)[0]
    return str((values.get("architectures") or [""])[0])
