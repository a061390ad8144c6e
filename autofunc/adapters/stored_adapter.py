"""Reading adapters that PEFT or `save_adapter` wrote."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autofunc.adapters.adapter import A, Adapter, B, Rank, factor_path
from autofunc.adapters.model import AdaptedModel
from autofunc.adapters.names import names_in_transformers
from autofunc.adapters.peft_folder import CONFIG, PREFIX, WEIGHTS
from autofunc.adapters.targets import homes_of, is_in_out, reads_of
from autofunc.captured.stored_tensors import StoredTensors
from autofunc.errors import ModelError, one_of
from autofunc.foreign_file import read_json
from autofunc.model import Model
from autofunc.model.stored import check_fit
from autofunc.shown import quoted, shown

_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "init_lora_weights"}
_WITHOUT_EFFECT = {  # on stored factors, whose names and shapes already give the weights and ranks
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "megatron_core", "modules_to_save", "peft_version",
    "qalora_group_size", "rank_pattern", "revision", "target_modules", "task_type",
}  # fmt: skip
# initialisations of the factors that leave the base unchanged
_KEEPS_BASE = (None, True, False, "gaussian", "eva", "orthogonal")


def load_adapter(model: Model, folder: str | Path) -> AdaptedModel:
    """Return a model with an adapter written by PEFT or `save_adapter`; the stored factors are its initial values.

    Args:
        model: the base; not modified.
        folder: with adapter_config.json and adapter_model.safetensors.

    Raises:
        ModelError: if the folder holds no adapter, one that isn't plain LoRA, or one that does not fit the model.

    Example:
        model = af.load_adapter(af.from_module(module, batch), "runs/mine/adapter")
        params = model.init()
    """
    if isinstance(model, AdaptedModel):
        raise ModelError(f"{model.title} already has adapters; load these into its base: model.base")
    folder = Path(folder).expanduser()
    size = _size(folder / CONFIG)
    stored = StoredTensors(folder / WEIGHTS)
    homes, canonical = homes_of(model), list(dict.fromkeys(map(model.canonical, model.spec)))
    own = {path: path for path in (*homes, *canonical)}
    matches = [
        _matched(stored, homes, canonical, names) for names in (own, {**own, **names_in_transformers(model, [*own])})
    ]
    found = min(matches, key=lambda each: len(each.left))
    if found.left or not found.homes:
        name = found.left[0] if found.left else "lora_A"
        raise ModelError(f"{shown(folder)}: {quoted(name)} fits no weight of {model.title}; {one_of(name, found.expected)}")
    reads, plan = reads_of(model, None), {}
    for home in found.homes:
        rank, features = stored.shapes[found.names[factor_path(home, A)]]
        rows, columns = homes[home].shape
        turned = is_in_out(home, reads) if reads is not None or rows == columns else features == rows
        plan[home] = Adapter(Rank(rank, size.alpha, size.dropout, size.use_rslora), (rows, columns), turned)
    values = _Values(stored, found.names)
    made = AdaptedModel(model, plan, found.saved, values)
    check_fit(values, {path: made.spec[path] for path in found.names})
    return made


class _Match(NamedTuple):
    """Stored tensors matched to parameters of a model."""

    names: dict[str, str]  # path -> stored name
    homes: list[str]  # weights that have factors
    saved: list[str]  # parameters stored in full
    left: list[str]  # stored names that match nothing
    expected: list[str]  # stored names that would match


class _Values:
    """`Stored` values of factors and of fully trained parameters, by path."""

    def __init__(self, stored: StoredTensors, names: Mapping[str, str]) -> None:
        self._stored, self._names = stored, names
        self.shapes: Mapping[str, tuple[int, ...]] = {path: stored.shapes[name] for path, name in names.items()}
        self.dtypes: Mapping[str, torch.dtype | str] = {path: stored.dtypes[name] for path, name in names.items()}

    def read(self, names: Iterable[str]) -> Mapping[str, Tensor]:
        """See `Stored.read`."""
        wanted = {path: self._names[path] for path in names}
        read = self._stored.read(wanted.values())
        return {path: read[name] for path, name in wanted.items()}


def _matched(stored: StoredTensors, homes: Iterable[str], whole: Sequence[str], names: Mapping[str, str]) -> _Match:
    factors = {factor_path(home, name): PREFIX + factor_path(names[home], name) for home in homes for name in (A, B)}
    wholes = {path: PREFIX + names[path] for path in whole}
    found = {path: name for path, name in {**wholes, **factors}.items() if name in stored.shapes}
    with_factors = [home for home in homes if factor_path(home, A) in found and factor_path(home, B) in found]
    used = {factor_path(home, name) for home in with_factors for name in (A, B)}
    fitting = {path: name for path, name in found.items() if path in used or path in wholes}
    saved = [path for path in fitting if path in wholes]
    left = sorted(stored.shapes.keys() - set(fitting.values()))
    return _Match(fitting, with_factors, saved, left, [*factors.values(), *wholes.values()])


def _size(path: Path) -> Rank:
    """Read rank, alpha and dropout from adapter_config.json."""
    given: Any = read_json(path, ModelError)
    if not isinstance(given, dict) or given.get("peft_type") != "LORA":
        kind = given.get("peft_type") if isinstance(given, dict) else type(given).__name__
        raise ModelError(f"{shown(path)}: peft_type is {quoted(str(kind))}; expected LORA")
    other = [key for key, value in given.items() if value and key not in _READ | _WITHOUT_EFFECT]
    if given.get("bias", "none") != "none":
        other.append("bias")
    if given.get("init_lora_weights") not in _KEEPS_BASE:
        other.append("init_lora_weights")
    if other:
        raise ModelError(
            f"{shown(path)}: {quoted(other[0])} is {quoted(str(given[other[0]]))}; only plain LoRA is supported, without it"
        )
    try:
        return Rank(
            given.get("r", 8), given.get("lora_alpha", 8), given.get("lora_dropout", 0.0), given.get("use_rslora") is True
        )
    except ModelError as error:
        raise ModelError(f"{shown(path)}: {error}") from error
