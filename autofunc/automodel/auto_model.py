"""`af.AutoModel`: a model by its architecture's name, registered or known to transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from autofunc import tree
from autofunc.automodel.build import Most, build, without_values
from autofunc.automodel.converted import ConvertedTensors
from autofunc.automodel.description import Description, describe
from autofunc.automodel.hub import CONFIGS, WEIGHTS, folder_of
from autofunc.automodel.in_transformers import WholeModel, is_model
from autofunc.automodel.saved_files import check_kinds, dtypes_of
from autofunc.automodel.write import write_pretrained
from autofunc.captured.pretrained import ConvertedForm, Pretrained, SafetensorsWeights, Weights
from autofunc.captured.stored_tensors import INDEX, SINGLE, StoredTensors, refuse_adapter
from autofunc.errors import ModelError, in_brief, one_of
from autofunc.foreign_file import NOT_THERE, check_file, is_folder, unfit
from autofunc.model import Model
from autofunc.shown import shown


class AutoModel:
    """Modules by architecture name. Registered classes come first, then those of transformers.

    The first of `architectures` in the config decides; if nothing known has that name, `model_type`: `my_custom` finds
    `MyCustomForCausalLM`. A registered class is called with its config: an instance of its `config_class`, else of the
    dataclass that annotates its first argument, else a namespace with the keys of the config.json.

    Example:
        af.register_modeling_path("my_models.custom_llm")
        pretrained = af.AutoModel.from_pretrained("path/to/folder", trainable=["lm_head*"])
        model = af.from_module(pretrained, {"input_ids": ids})
    """

    def __init__(self) -> NoReturn:
        raise ModelError("AutoModel has no instances; call AutoModel.from_config(...) or AutoModel.from_pretrained(...)")

    @staticmethod
    def from_config(
        config: Any, *, trust_remote_code: bool = False, revision: str | None = None, **overrides: Any
    ) -> nn.Module:  # fmt: skip
        """Build a module without pretrained weights. Its parameters take no memory: a pipeline initialises its stages'.

        Args:
            config: a mapping, a config object, a config.json or its folder, or the name of a model on the hub.
            trust_remote_code: whether code next to the config.json may be run.
            revision: of a model on the hub.
            overrides: config keys with new values (`num_hidden_layers=2`, `dtype="bfloat16"`).

        Returns:
            A module for `af.from_module`, in train mode, with its parameters on the meta device.

        Raises:
            ModelError: if there is no such config or class, or the class refuses its config.
        """
        description = describe(config, overrides, lambda name: folder_of(name, CONFIGS, revision))
        return build(description, description.dtype, trust_remote_code=trust_remote_code)

    @staticmethod
    def from_pretrained(
        pretrained_model_name_or_path: str | Path,
        *,
        trainable: Sequence[str] | None = None,
        dtype: torch.dtype | str | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        **overrides: Any,
    ) -> Pretrained:
        """Build a module whose weights are read when a pipeline asks for them, so a process reads only its own part.

        Args:
            pretrained_model_name_or_path: a folder with config.json and safetensors files, or the name of a model on
                the hub, taken from the local cache (and downloaded first, unless HF_HUB_OFFLINE is set).
            trainable: patterns of the parameters that get gradients, such as ["lm_head*"]; by default all.
            dtype: of floating-point parameters; by default the config's, else the files'.
            trust_remote_code: see `from_config`.
            revision: a branch, tag or commit of a model on the hub.
            overrides: see `from_config`.

        Returns:
            An argument for `af.from_module`; its module is in train mode.

        Raises:
            ModelError: see `from_config`; for weights that are missing, unexpected or of the wrong shape, and for PEFT
                adapters.
        """
        folder = Path(pretrained_model_name_or_path).expanduser()
        if not is_folder(folder):
            if unfit(folder) is None:
                raise ModelError(f"{shown(folder)} is a file; name the folder with it and a config.json")
            folder = folder_of(str(pretrained_model_name_or_path), WEIGHTS, revision)
        refuse_adapter(folder)
        overrides = overrides if dtype is None else {**overrides, "dtype": dtype}
        description = describe(folder, overrides, lambda name: folder_of(name, WEIGHTS, revision))
        stored = StoredTensors(folder) if _has_safetensors(folder) else None
        chosen = description.dtype or (stored.dtype if stored is not None else None) or torch.get_default_dtype()
        most = None if stored is None else Most.of_stored(stored.shapes.values())
        module = without_values(build(description, chosen, trust_remote_code=trust_remote_code, most=most))
        if trainable is not None:
            _check_patterns(module, trainable)
        _read_generation_config(module, folder)
        return Pretrained(
            module, _weights(module, stored, description, chosen), None if trainable is None else tuple(trainable)
        )

    @staticmethod
    def export(
        model: Model | Pretrained | nn.Module,
        params: tree.Nested | str | Path,
        folder: str | Path,
        *,
        max_shard_size: int | str = "5GB",
    ) -> Path:
        """Write parameters as a folder that `from_pretrained` loads; see `autofunc.automodel.write_pretrained`."""
        return write_pretrained(model, params, folder, max_shard_size=max_shard_size)


def _has_safetensors(folder: Path) -> bool:
    return any(unfit(folder / name) != NOT_THERE for name in (SINGLE, INDEX))


def _weights(
    module: nn.Module, stored: StoredTensors | None, description: Description, dtype: torch.dtype
) -> Weights:  # fmt: skip
    folder = description.folder
    assert folder is not None
    if stored is None and not is_model(module):
        stored = StoredTensors(folder)  # raises, naming the missing files
    because = "it has no safetensors files"
    if stored is not None:
        try:
            weights = _by_name(stored, module)
        except ConvertedForm as error:
            because = str(error)
            check_kinds(folder, stored.dtypes, dtypes_of(module))
        else:
            weights.check(name for name, _ in module.named_parameters())
            return weights
    return WholeModel(type(module), folder, module, dtype, because)


def _by_name(stored: StoredTensors, module: nn.Module) -> SafetensorsWeights:
    try:
        return SafetensorsWeights(stored, module)
    except ConvertedForm:
        return SafetensorsWeights(ConvertedTensors(stored, module), module)


def _check_patterns(module: nn.Module, trainable: Sequence[str]) -> None:
    """Refuse patterns that match nothing before anything is captured; see `Model.trainable`."""
    names = {id(leaf): name for name, leaf in module.named_parameters()}
    for pattern in trainable:
        if any(tree.matches(name, [pattern]) for name in names.values()):
            continue
        for alias, leaf in module.named_parameters(remove_duplicate=False):
            if tree.matches(alias, [pattern]):
                raise ModelError(
                    f"trainable pattern {pattern!r} matches {alias}, which is tied to {names[id(leaf)]}; name that, or "
                    "untie them in the config (tie_word_embeddings=False)"
                )
        raise ModelError(f"trainable pattern {pattern!r} matches no parameter; {one_of(pattern, names.values())}")


def _read_generation_config(module: nn.Module, folder: Path) -> None:
    """Attach the folder's generation_config.json, if any, to the module."""
    file = folder / "generation_config.json"
    if hasattr(module, "generation_config") and unfit(file) != NOT_THERE:
        from transformers import GenerationConfig

        check_file(file, ModelError)
        try:
            module.generation_config = GenerationConfig.from_pretrained(folder)
        except Exception as error:  # the file may hold anything
            raise ModelError(f"{shown(folder)}: generation_config.json: {in_brief(error)}") from error
