"""From a configuration to the model that is trained, and its loss."""

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
from autofunc.checks import weighed_alike_by
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

_ROWS = 4  # on which the loss is looked at
OWN, SEED = "own", "seed"
"""Values of `weights`: those that the module was made with; or made from (seed, path) layer by layer."""


def build_model(config: FinetuneConfig, dataset: Any) -> Model:
    """What is trained: what `model._target_` gives, with the adapters that are wanted.

    Raises:
        ConfigError: see `build_base` and `with_adapters`.
    """
    base = build_base(config, dataset)
    return base if config.peft is None else with_adapters(base, config.peft, config, dataset)


def build_base(config: FinetuneConfig, dataset: Any) -> Model:
    """What `model._target_` gives, as a model of named layers.

    Args:
        config: what is wanted.
        dataset: whose first rows a module is captured with.

    Raises:
        ConfigError: for what is neither a module nor a model, and for a module that cannot be captured.
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
        raise ConfigError("inputs says what a module's forward gets, but model._target_ gives an af.Model: leave it out")
    if config.weights == OWN:
        raise ConfigError("weights: own: an af.Model has none of its own; leave it out")
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
    """Call `model._target_`: with a seeded generator, so that all processes get the same; without weights if not `own`."""
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
    """The configured loss; else None where the model gives its own, and the causal one where it does not.

    Args:
        config: what is wanted.
        model: what is trained.
        where: the section of the dataset, for messages.
        dataset: to try it with.
        notes: told what was chosen.
        checked: whether another process has tried it already.

    Raises:
        ConfigError: where it cannot run on the dataset's rows, or would shift labels that are aligned already.
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
        weighs = weighed_alike_by(model, first_rows(dataset, _ROWS), loss, config.inputs)
        notes += [f"loss_fn: {weighs}"] if weighs else []
    if loss is not None:
        return loss
    if not checked:
        refuse_shifted_twice(config, model, dataset)
    notes.append("no loss_fn: the loss is the model's own")
    return None


def loss_to_check(config: FinetuneConfig, made: Model | nn.Module | Pretrained, batch: Mapping[str, Any]) -> Loss | None:
    """The loss that a run would use, as far as the model lets itself be looked at."""
    if config.loss_fn is not None:
        return _configured_loss(config.loss_fn)
    try:
        model = made if isinstance(made, Model) else capture_module(made, batch, inputs=config.inputs)
        return None if gives_loss(model, batch) else losses.causal_lm
    except AutofuncError:
        return None  # a check will tell


def _configured_loss(section: Mapping[str, Any]) -> Loss:
    loss, options = target_and_arguments(section, "loss_fn")
    return partial(loss, **options) if options else loss


def build_metrics(
    config: FinetuneConfig, model: Model, loss: Loss | None, datasets: Mapping[str, Any], rows: int
) -> dict[str, Loss]:  # fmt: skip
    """The configured metrics by name.

    Args:
        config: what is wanted.
        model: what is trained.
        loss: of the run.
        datasets: to try them with, by section; none where another process has tried them already.
        rows: of a microbatch of these.

    Raises:
        ConfigError: where one cannot run on a dataset's rows, or gives no scalar.
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
    """Whether what a model returns for such a microbatch has a loss."""
    returned = infer_boundaries(split(model), {}, microbatch, with_loss=False).stages[-1]
    return own_loss(tree.from_leaves(returned.leaves, returned.spec)) is not None
