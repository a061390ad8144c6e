"""Writing trained parameters as a folder that `from_pretrained` loads, here and in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from autofunc import tree
from autofunc.adapters import AdaptedModel
from autofunc.automodel.description import CONFIG, values_of
from autofunc.automodel.in_transformers import is_model
from autofunc.automodel.registry import ARCHITECTURES, model_type_of
from autofunc.captured import CapturedModel
from autofunc.captured.filled import filled, full_values
from autofunc.captured.module import source_of
from autofunc.captured.pretrained import Pretrained
from autofunc.captured.stored_tensors import INDEX, SINGLE, StoredTensors
from autofunc.errors import ModelError
from autofunc.model import Model


def write_pretrained(
    model: Model | Pretrained | nn.Module,
    params: tree.Nested | str | Path,
    folder: str | Path,
    *,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write a folder with config.json and the weights, bit for bit as in `params`.

    A transformers model is written by its own `save_pretrained`: tied parameters once, its generation config, and weights
    in the form its checkpoints store. Any other module needs a `config` attribute; `af.AutoModel.from_pretrained` loads its
    folder once its class is registered. The module is not modified. A model of pure layers is written in the form that its
    `Model.in_transformers` defines, as those of `stages/` do. For a model with adapters the base is written, with the
    adapters' changes added to its weights.

    Args:
        model: that the parameters belong to; its module may be on the meta device.
        params: a full tree of parameters, on any device, nested or flat (canonical path -> tensor), with or without buffers
            that are state; or a file that training wrote (model.safetensors).
        folder: created if missing; weights of an earlier export in it are replaced.
        max_shard_size: of one file, in bytes or as "5GB"; larger weights are split into several files.

    Returns:
        The folder.

    Raises:
        ModelError: for parameters that are missing, unknown or of the wrong shape, and for a missing or invalid config.
    """
    folder = Path(folder).expanduser()
    if isinstance(model, AdaptedModel):
        params, model = model.merged(_flat(params)), model.base
    if isinstance(model, Model) and not isinstance(model, CapturedModel):
        config, leaves = _in_transformers(model, _flat(params))
        _write_files(folder, config, leaves, max_shard_size)
        return folder
    source = source_of(model)
    values = full_values(source, _flat(params))
    made = filled(source, {name: leaf.detach().cpu().contiguous() for name, leaf in values.items()})
    if is_model(made):
        folder.mkdir(parents=True, exist_ok=True)
        _remove_weights(folder)
        made.save_pretrained(folder, max_shard_size=max_shard_size)
    else:
        _write_files(folder, *_by_name(made), max_shard_size)
    return folder


def check_writable(model: Model | Pretrained | nn.Module) -> None:
    """Refuse a model that `write_pretrained` could not write, whatever its parameters.

    Raises:
        ModelError: for a model of functions without `in_transformers`, and a module without a valid config.
    """
    model = model.base if isinstance(model, AdaptedModel) else model
    if isinstance(model, Model) and not isinstance(model, CapturedModel):
        _check_says_what_it_is(model)
        return
    module = source_of(model).module
    if not is_model(module):
        _as_json(_config_values(module))


def _check_says_what_it_is(model: Model) -> None:
    if model.in_transformers is None:
        raise ModelError(
            f"{model!r} is made of functions and has no form in transformers; give it "
            "af.Model(..., in_transformers=...), or save model.state_dict(params)"
        )


def _flat(params: tree.Nested | str | Path) -> dict[str, Tensor]:
    if isinstance(params, (str, Path)):
        stored = StoredTensors(params)
        return stored.read(stored.shapes)
    return tree.flatten(params)


def _in_transformers(model: Model, params: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config and the weights of a model of pure layers, each weight once."""
    _check_says_what_it_is(model)
    assert model.in_transformers is not None
    known = model.state_dict(params)
    flat = {path: known[path].cpu().contiguous() for path in sorted({model.canonical(path) for path in model.spec})}
    config, state = model.in_transformers(flat)
    first = {id(leaf): name for name, leaf in reversed([*state.items()])}
    return dict(config), {name: leaf for name, leaf in state.items() if first[id(leaf)] == name}


def _by_name(module: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config and the weights of a module without `save_pretrained`: each parameter once, by canonical name."""
    config = _config_values(module)
    state = module.state_dict(keep_vars=True)
    first = {id(leaf): name for name, leaf in module.named_parameters()}
    # different parameters may share memory; a file holds each separately
    leaves = {
        name: leaf.detach().clone() for name, leaf in state.items()
        if isinstance(leaf, Tensor) and first.get(id(leaf), name) == name
    }  # fmt: skip
    return config, leaves


def _write_files(folder: Path, config: dict[str, Any], leaves: dict[str, Tensor], max_shard_size: int | str) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    floats = [leaf.dtype for leaf in leaves.values() if leaf.is_floating_point()]
    if floats:
        config["dtype"] = str(floats[0]).removeprefix("torch.")
    text = _as_json(config)
    folder.mkdir(parents=True, exist_ok=True)
    _remove_weights(folder)
    (folder / CONFIG).write_text(text)
    split = split_torch_state_dict_into_shards(leaves, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        save_file({name: leaves[name] for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _config_values(module: nn.Module) -> dict[str, Any]:
    cls = type(module)
    config = getattr(module, "config", None)
    if config is None:
        raise ModelError(
            f"{cls.__name__} has no config attribute, which is needed to rebuild it; set self.config (a "
            "dataclass, a dict, or an object with attributes) in __init__"
        )
    values = values_of(config)
    name = ARCHITECTURES.name_of(cls) or cls.__name__
    values.pop("torch_dtype", None)
    return {**values, "architectures": [name], "model_type": values.get("model_type") or model_type_of(name)}


def _as_json(config: dict[str, Any]) -> str:
    for key, value in config.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ModelError(f"the config cannot be written as JSON: {key!r} is {value!r}: {error}") from error
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _remove_weights(folder: Path) -> None:
    for file in [folder / SINGLE, folder / INDEX, *folder.glob("model-*-of-*.safetensors")]:
        file.unlink(missing_ok=True)
