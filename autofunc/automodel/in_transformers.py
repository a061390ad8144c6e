"""The models of `transformers`: their classes, configs, and weights that only transformers can read."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autofunc.automodel.description import Description, changed, from_dict
from autofunc.automodel.registry import known_architectures
from autofunc.automodel.saved_files import check_saved, dtypes_of
from autofunc.captured.stored_tensors import INDEX, SINGLE
from autofunc.errors import ModelError, in_brief, one_of, some_of
from autofunc.shown import quoted, shown


def find_class(name: str) -> Any:
    """Return the transformers model class with this name, or None."""
    import transformers  # takes seconds to import

    found = getattr(transformers, name, None)
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def is_model(module: nn.Module) -> bool:
    """Return whether a module is an instance of a transformers model class."""
    transformers = sys.modules.get("transformers")  # such a module implies that it is imported
    return transformers is not None and isinstance(module, transformers.PreTrainedModel)


def set_dtype(config: Any, dtype: torch.dtype | None) -> None:
    """Set the dtype that a model is built in, in its transformers config and the configs inside it."""
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))):
        if part is not None and dtype is not None:
            part.dtype = dtype


def class_and_config(description: Description, *, trust_remote_code: bool) -> tuple[Any, Any]:
    """Return transformers' class for a model, and its config.

    `architectures` names the class; without it, the causal language model of its `model_type` is taken.

    Args:
        description: of the model.
        trust_remote_code: whether code next to the config.json may be run.

    Raises:
        ModelError: if there is no such class, the weights are quantized, or the model needs code that is not trusted.
    """
    import transformers

    values, what = description.values, description.what
    if values.get("quantization_config"):
        raise ModelError(f"{what} is quantized (quantization_config), which cannot be trained; use unquantized weights")
    named = values.get("transformers_weights")
    if named not in (None, SINGLE, INDEX):
        raise ModelError(f"{what}: transformers_weights is {quoted(named)}; expected {SINGLE} or {INDEX}, or nothing")
    cls = find_class(description.architecture) if description.architecture else None
    if cls is None and description.folder is not None and description.auto_map:
        if not trust_remote_code:
            raise ModelError(
                f"{what} brings its own code ({some_of(description.auto_map.values())}); read it, then pass "
                "trust_remote_code=True to run it"
            )
        return _remote(description)
    if isinstance(description.given, transformers.PreTrainedConfig):
        config = changed(description.given, description.overrides, what)
    else:
        config_class = cls.config_class if cls is not None else _config_class(description)
        config = from_dict(config_class, description)
    if cls is None:
        causal = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        if description.architecture is not None or type(config) not in causal:
            raise unknown(description)
        cls = causal[type(config)]
        cls = cls[0] if isinstance(cls, (list, tuple)) else cls
    return cls, config


def unknown(description: Description) -> ModelError:
    """Return the error for a model without a class."""
    import transformers

    named, model_type = description.architecture, description.model_type
    if named is None and model_type is None:
        return ModelError(
            f"{description.what} has neither architectures nor model_type, so its class is unknown; add "
            '"architectures": ["MyCustomForCausalLM"]'
        )
    registered = known_architectures()
    listed = f"registered are {', '.join(registered)}" if registered else "none are registered"
    given = f"architecture {quoted(named)}" if named is not None else f"model_type {quoted(model_type)}"
    near = one_of(named or model_type, _nearby(named))
    return ModelError(
        f"{description.what}: there is no {given}: {listed} (af.register_modeling_path registers your own), and of those "
        f"of transformers {transformers.__version__}: {near}"
    )


def _nearby(architecture: str | None) -> list[str]:
    import transformers

    if architecture is None:
        return list(transformers.CONFIG_MAPPING.keys())
    return [name for name in dir(transformers) if "For" in name and name[0].isupper() and not name.startswith("Auto")]


def _config_class(description: Description) -> Any:
    import transformers

    if description.model_type not in transformers.CONFIG_MAPPING:
        raise unknown(description)
    return transformers.CONFIG_MAPPING[description.model_type]


def _remote(description: Description) -> tuple[Any, Any]:
    """Return a class and a config whose code is next to the config.json."""
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    folder, places = str(description.folder), description.auto_map
    elsewhere = sorted(place for place in places.values() if "--" in place or "/" in place)
    if elsewhere:
        raise ModelError(
            f"{description.what}: auto_map names {quoted(elsewhere[0])}, code that is not next to the config.json; put it "
            "there, or import it in your own _target_"
        )
    named = [place for place in places.values() if place.rpartition(".")[2] == description.architecture]
    place = named[0] if named else places.get("AutoModelForCausalLM") or places.get("AutoModel")
    if place is None:
        raise ModelError(f"{description.what}: auto_map has no class {description.architecture!r}; {one_of('', places)}")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    return get_class_from_dynamic_module(place, folder), changed(config, description.overrides, description.what)


class WholeModel:
    """Weights that transformers converts on loading: it loads the whole model, once per process.

    Args:
        cls: the model's class.
        folder: with its files.
        module: the same model without values.
        dtype: of floating-point parameters.
        because: the reason, for the warning.

    Raises:
        ModelError: for files that should not be loaded, see `check_saved`.
    """

    def __init__(self, cls: Any, folder: Path, module: nn.Module, dtype: torch.dtype, because: str) -> None:
        check_saved(folder, dtypes_of(module))
        self._cls, self._folder, self._dtype = cls, folder, dtype
        self._config: Any = module.config
        self._names = {*module.state_dict(), *dict(module.named_parameters(remove_duplicate=False))}
        self._values: Mapping[str, Tensor] | None = None
        self.note: str | None = (
            f"{shown(folder)}: every process loads the whole model to read its part of it, because {because}"
        )
        warnings.warn(self.note, stacklevel=4)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """See `Weights.read`.

        Raises:
            ModelError: if transformers cannot load it, or reports missing or unexpected weights.
        """
        wanted = list(names)
        if wanted and self._values is None:
            self._values = self._load()
        return {name: self._values[name] for name in wanted} if self._values is not None else {}

    def _load(self) -> Mapping[str, Tensor]:
        try:
            model, info = self._cls.from_pretrained(
                self._folder, config=self._config, dtype=self._dtype, output_loading_info=True, local_files_only=True
            )
        except Exception as error:
            message = in_brief(error)
            raise ModelError(f"{shown(self._folder)}: transformers cannot load it: {message}") from error
        for what, names in info.items():
            if names:
                listed = some_of(sorted(map(str, names)), 5)
                raise ModelError(
                    f"{shown(self._folder)} does not fit {self._cls.__name__}: {what.replace('_', ' ')}: {listed}"
                )
        values: dict[str, Tensor] = {**model.state_dict(), **dict(model.named_parameters(remove_duplicate=False))}
        return {name: leaf.detach() for name, leaf in values.items() if isinstance(leaf, Tensor)}
