"""Build the model to train and its loss from a configuration."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from autofunc import losses, tree
from autofunc.automodel import register_modeling_path
from autofunc.captured import Pretrained, StoredTensors, capture_module, empty_weights
from autofunc.checks import weighting_warning
from autofunc.config import FinetuneConfig, instantiate, target_and_arguments
from autofunc.counted_rows import measured
from autofunc.data import first_rows
from autofunc.errors import AutofuncError, ConfigError
from autofunc.losses import Loss, own_loss
from autofunc.model import Model
from autofunc.splitting import infer_boundaries, split
from autofunc.train.adapters import with_adapters
from autofunc.train.labels import refuse_shifted_twice
from autofunc.train.weighing import counting_all

_ROWS = 4  # to check the loss on
OWN, SEED = "own", "seed"
"""Values of `weights`: the weights the module is constructed with; or weights from (seed, path), layer by layer."""


def build_model(config: FinetuneConfig, dataset: Any) -> Model:
    """Build the model to train: the one of `model._target_`, with adapters if configured.

    Raises:
        ConfigError: see `build_base` and `with_adapters`.
    """
    base = build_base(config, dataset)
    return base if config.peft is None else with_adapters(base, config.peft, config, dataset)


def build_base(config: FinetuneConfig, dataset: Any) -> Model:
    """Build the model of `model._target_`, as a model of named layers.

    Args:
        config: the configuration.
        dataset: its first rows trace a module.

    Raises:
        ConfigError: if the target returns neither a module nor a model, or a module that cannot be captured.
    """
    made = make(config)
    stored = None if config.weights in (None, OWN, SEED) else config.weights
    if not isinstance(made, Model):
        example = first_rows(dataset, config.step_scheduler.local_batch_size)
        try:
            return capture_module(made, example, inputs=config.inputs, trainable=config.trainable, weights=stored)
        except AutofuncError as error:
            raise ConfigError(f"model: {error}") from error
    if config.inputs is not None:
        raise ConfigError("inputs is for a module's forward, but model._target_ gives an af.Model: leave it out")
    if config.weights == OWN:
        raise ConfigError("weights: own: an af.Model has no weights of its own; leave it out")
    model = copy.copy(made)
    if config.trainable is not None:
        model.trainable = tuple(config.trainable)
    if stored is not None:
        try:
            model.stored = StoredTensors(stored)
            model.check_stored()
        except AutofuncError as error:
            raise ConfigError(f"weights: {error}") from error
    return model


def make(config: FinetuneConfig) -> Model | nn.Module | Pretrained:
    """Call `model._target_`: seeded, so that all processes get the same; without weights unless they are `own`."""
    wanted = config.weights or OWN
    for path in config.modeling_paths:
        try:
            register_modeling_path(path, exist_ok=True)
        except AutofuncError as error:
            raise ConfigError(f"modeling_paths: {error}") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if wanted == OWN:
            made = instantiate(config.model, "model")
        else:
            with empty_weights(config.seed):
                made = instantiate(config.model, "model")
    if not isinstance(made, (Model, nn.Module, Pretrained)):
        raise ConfigError(
            f"model: {config.model['_target_']} returned {type(made).__name__}; expected an nn.Module, an "
            "af.Model, or what af.AutoModel.from_pretrained returns"
        )
    return made


def build_loss(
    config: FinetuneConfig, model: Model, where: str, dataset: Any, notes: list[str], *, checked: bool = False
) -> Loss | None:  # fmt: skip
    """Return the configured loss; else None if the model computes its own, or the causal one if it does not.

    Args:
        config: the configuration.
        model: the model to train.
        where: the section of the dataset, for messages.
        dataset: to try the loss with.
        notes: gains a line about the choice.
        checked: another process has tried it already.

    Raises:
        ConfigError: if it cannot run on the dataset's rows, or would shift labels that are already aligned.
    """
    microbatch = first_rows(dataset, config.step_scheduler.local_batch_size)
    loss = _configured_loss(config.loss_fn) if config.loss_fn is not None else None
    try:
        if loss is None and not gives_loss(model, microbatch):
            loss = losses.causal_lm
        if not checked:
            infer_boundaries(split(model), {}, microbatch, loss)
    except AutofuncError as error:
        raise ConfigError(f"the model on a batch of {where}: {error}") from error
    if not checked and loss is not losses.causal_lm:
        weighs = weighting_warning(model, first_rows(dataset, _ROWS), loss, config.inputs)
        notes += [f"loss_fn: {weighs}"] if weighs else []
    if loss is not None:
        return loss
    if not checked:
        refuse_shifted_twice(config, model, dataset)
    notes.append("no loss_fn: the loss is the model's own")
    return None


def loss_to_check(config: FinetuneConfig, made: Model | nn.Module | Pretrained, batch: Mapping[str, Any]) -> Loss | None:
    """Return the loss that a run would use, as far as the model can be inspected."""
    if config.loss_fn is not None:
        return _configured_loss(config.loss_fn)
    try:
        model = made if isinstance(made, Model) else capture_module(made, batch, inputs=config.inputs)
        return None if gives_loss(model, batch) else losses.causal_lm
    except AutofuncError:
        return None  # the checks report it


def _configured_loss(section: Mapping[str, Any]) -> Loss:
    loss, options = target_and_arguments(section, "loss_fn")
    return partial(loss, **options) if options else loss


def build_metrics(
    config: FinetuneConfig, model: Model, loss: Loss | None, datasets: Mapping[str, Any], rows: int
) -> dict[str, Loss]:  # fmt: skip
    """Return the configured metrics by name.

    Args:
        config: the configuration.
        model: the model to train.
        loss: the run's loss.
        datasets: to try them with, by section; empty if another process has tried them already.
        rows: rows per microbatch of these.

    Raises:
        ConfigError: if a metric cannot run on a dataset's rows, or does not return a scalar.
    """
    metrics: dict[str, Loss] = {}
    for name, section in config.metrics.items():
        metric, options = target_and_arguments(section, f"metrics.{name}")
        metrics[name] = partial(metric, **options) if options else metric
    for where, dataset in datasets.items() if metrics else ():
        microbatch = counting_all(first_rows(dataset, rows))
        try:
            infer_boundaries(split(model), {}, microbatch, measured(loss, rows, metrics))
        except AutofuncError as error:
            raise ConfigError(f"metrics on a batch of {where}: {error}") from error
    return metrics


def gives_loss(model: Model, microbatch: Mapping[str, Any]) -> bool:
    """Return whether a model's output for such a microbatch contains a loss."""
    returned = infer_boundaries(split(model), {}, microbatch, with_loss=False).stages[-1]
    return own_loss(tree.from_leaves(returned.leaves, returned.spec)) is not None
