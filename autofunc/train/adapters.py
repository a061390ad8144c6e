"""Adapters in a run: build the model that section `peft` describes, and read back the adapters a run wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autofunc.adapters import AdaptedModel, load_adapter, lora
from autofunc.config import FinetuneConfig, Peft
from autofunc.data import first_rows
from autofunc.errors import AutofuncError, ConfigError
from autofunc.foreign_file import is_folder
from autofunc.model import Model
from autofunc.train.output import ADAPTER


def with_adapters(base: Model, wanted: Peft, config: FinetuneConfig, dataset: Any) -> AdaptedModel:
    """Return the base model with the adapters that section `peft` asks for.

    Args:
        base: the model that `model._target_` builds.
        wanted: the section.
        config: the whole configuration.
        dataset: its first rows trace the model.

    Raises:
        ConfigError: if keys contradict each other or the adapters do not fit the model.
    """
    if config.trainable is not None:
        raise ConfigError(
            f"trainable: {config.trainable} has no effect, because peft trains only adapters; leave it out, and list what "
            "to train in full under peft.modules_to_save"
        )
    if wanted.target_modules is not None and wanted.match_all_linear:
        raise ConfigError("peft: match_all_linear replaces target_modules; leave one of them out")
    if wanted.target_modules is None and not wanted.match_all_linear and wanted.exclude_modules is None:
        raise ConfigError("peft: name weights in target_modules, such as [q_proj, v_proj], or set match_all_linear: true")
    try:
        return lora(
            base, wanted.target_modules or "all-linear", wanted.dim, wanted.alpha, wanted.dropout,
            exclude=wanted.exclude_modules or (), modules_to_save=wanted.modules_to_save or (),
            use_rslora=wanted.use_rslora, example_batch=first_rows(dataset, config.step_scheduler.local_batch_size),
        )  # fmt: skip
    except AutofuncError as error:
        raise ConfigError(f"peft: {str(error).removeprefix('lora: ')}") from error


def described(model: Model) -> str | None:
    """Describe how few parameters are trained and what their gradients take; None if all are trained."""
    canonical = {model.canonical(path): leaf for path, leaf in model.spec.items()}
    total = sum(leaf.numel() for leaf in canonical.values())
    trained = sum(leaf.numel() for path, leaf in canonical.items() if model.is_trainable(path))
    if trained == total:
        return None
    adapters = ""
    if isinstance(model, AdaptedModel):
        size = next(iter(model.plan.values())).size
        adapters = f"adapters of rank {size.rank} on {len(model.plan)} weights: "
    return (
        f"{adapters}{trained:,} of {total:,} parameters are trained ({trained / total:.2%}); their summed gradients take "
        f"{4 * trained:,} bytes instead of {4 * total:,}"
    )


def trained_model(base: Model, left: Path) -> AdaptedModel:
    """Return the model with the adapter of a run, given its output folder or the adapter's own folder.

    Raises:
        AutofuncError: if the folder holds no adapter, or the adapter does not fit the model.
    """
    inside = left / ADAPTER
    return load_adapter(base, inside if is_folder(inside) else left)
