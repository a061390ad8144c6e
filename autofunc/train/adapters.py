"""Adapters in a run: from the section `peft` to a model, and where they are written and read again."""

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
    """A model with the adapters that a configuration wants.

    Args:
        base: what `model._target_` gives.
        wanted: the section.
        config: the whole of it.
        dataset: whose first rows the model is followed on.

    Raises:
        ConfigError: for keys that contradict each other, and for adapters that do not fit the model.
    """
    if config.trainable is not None:
        raise ConfigError(
            f"trainable: {config.trainable} has no effect, for peft trains adapters alone; leave it out, and name what is "
            "trained whole in peft.modules_to_save"
        )
    if wanted.target_modules is not None and wanted.match_all_linear:
        raise ConfigError("peft: match_all_linear takes the place of target_modules; leave one of them out")
    if wanted.target_modules is None and not wanted.match_all_linear and wanted.exclude_modules is None:
        raise ConfigError("peft: name weights in target_modules, such as [q_proj, v_proj], or say match_all_linear: true")
    try:
        return lora(
            base, wanted.target_modules or "all-linear", wanted.dim, wanted.alpha, wanted.dropout,
            exclude=wanted.exclude_modules or (), modules_to_save=wanted.modules_to_save or (),
            use_rslora=wanted.use_rslora, example_batch=first_rows(dataset, config.step_scheduler.local_batch_size),
        )  # fmt: skip
    except AutofuncError as error:
        raise ConfigError(f"peft: {str(error).removeprefix('lora: ')}") from error


def described(model: Model) -> str | None:
    """How little is trained, and what its gradients take; None where all parameters are."""
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
        f"{adapters}{trained:,} of {total:,} parameters are trained ({trained / total:.2%}); sums of their gradients take "
        f"{4 * trained:,} bytes, and not {4 * total:,}"
    )


def trained_model(base: Model, left: Path) -> AdaptedModel:
    """A model with the adapter that a run left: in its output folder, or in the folder of the adapter itself.

    Raises:
        AutofuncError: when there is none, or it does not fit the model.
    """
    inside = left / ADAPTER
    return load_adapter(base, inside if is_folder(inside) else left)
