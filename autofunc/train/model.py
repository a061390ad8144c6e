"""From a configuration to the model that is trained, and its loss."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from autofunc import losses, tree
from autofunc.captured import empty_weights, from_module
from autofunc.config import FinetuneConfig, check_arguments, instantiate, resolve_target
from autofunc.data import first_rows
from autofunc.errors import AutofuncError, ConfigError
from autofunc.losses import Loss, own_loss
from autofunc.model import Model
from autofunc.splitting import infer_boundaries, split

OWN, SEED = "own", "seed"
"""Values of `weights`: those that the module was made with; or made from (seed, path) layer by layer."""


def build_model(config: FinetuneConfig, dataset: Any) -> Model:
    """What `model._target_` gives, as a model of named layers.

    Args:
        config: what is wanted.
        dataset: whose first rows a module is captured with.

    Raises:
        ConfigError: for what is neither a module nor a model; other errors as they come, with the key.
    """
    made = make(config)
    if not isinstance(made, Model):
        example = first_rows(dataset, config.step_scheduler.local_batch_size)
        try:
            return from_module(made, example, inputs=config.inputs, trainable=config.trainable)
        except AutofuncError as error:
            raise type(error)(f"model: {error}") from error
    if config.inputs is not None:
        raise ConfigError("inputs says what a module's forward gets, but model._target_ gives an af.Model: leave it out")
    if config.weights not in (None, SEED):
        raise ConfigError(
            f"weights={config.weights!r}: an af.Model has none of its own; leave it out, or use weights: seed"
        )
    if config.trainable is None:
        return made
    model = copy.copy(made)
    model.trainable = tuple(config.trainable)
    return model


def make(config: FinetuneConfig) -> Model | nn.Module:
    """Call `model._target_`: with a seeded generator, so that all processes get the same; without weights for `seed`."""
    wanted = config.weights or OWN
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if wanted == OWN:
            made = instantiate(config.model, "model")
        else:
            with empty_weights():
                made = instantiate(config.model, "model")
    if not isinstance(made, (Model, nn.Module)):
        raise ConfigError(
            f"model: {config.model['_target_']} returned {type(made).__name__}; expected an nn.Module or an af.Model"
        )
    return made


def build_loss(config: FinetuneConfig, model: Model, dataset: Any, notes: list[str]) -> Loss | None:
    """The configured loss; else None where the model gives its own, and the causal one where it does not.

    Args:
        config: what is wanted.
        model: what is trained.
        dataset: to try it with.
        notes: told what was chosen.

    Raises:
        ConfigError: where a model would shift labels that the dataset has aligned already.
    """
    if config.loss_fn is not None:
        loss = resolve_target(config.loss_fn["_target_"], "loss_fn._target_")
        options = {key: value for key, value in config.loss_fn.items() if key != "_target_"}
        check_arguments(loss, options, "loss_fn", config.loss_fn["_target_"], given_later=2)
        return partial(loss, **options) if options else loss
    if not gives_loss(model, first_rows(dataset, config.step_scheduler.local_batch_size)):
        return losses.causal_lm
    if getattr(dataset, "aligned_labels", False) and shifts_labels(model):
        raise ConfigError(
            f"loss_fn: the model's own loss shifts labels by one, and {type(dataset).__name__} gives labels that are "
            "aligned already. Set dataset.aligned_labels: false, so that it gives the tokens themselves; or loss_fn: "
            "{_target_: autofunc.losses.causal_lm}, which takes aligned ones"
        )
    notes.append("no loss_fn: the loss is the model's own")
    return None


def gives_loss(model: Model, microbatch: Mapping[str, Any]) -> bool:
    """Whether what a model returns for such a microbatch has a loss."""
    returned = infer_boundaries(split(model), {}, microbatch, with_loss=False).stages[-1]
    return own_loss(tree.from_leaves(returned.leaves, returned.spec)) is not None


def shifts_labels(model: Model) -> bool:
    """Whether the model's own loss compares each position with the next label: transformers' causal language models do."""
    module = getattr(model, "module", None)
    is_transformers = type(module).__module__.startswith("transformers.")
    return is_transformers and (type(module).__name__.endswith(("ForCausalLM", "LMHeadModel")))
