"""The data of a run: each dataset is read once in a process, and every rank loads its part of each batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from autofunc.config import FinetuneConfig, instantiate
from autofunc.data import make_loader
from autofunc.errors import ConfigError
from autofunc.losses import Loss
from autofunc.model import Model


class Loaders(NamedTuple):
    """What makes the batches of a run. Each function takes `place` and `places`: which part of every batch, of how many."""

    train: Callable[..., Any]
    validation: Callable[..., Any] | None
    num_batches: int  # of an epoch
    train_drops_last: bool  # whether a short last batch is left out
    validation_drops_last: bool


def read_dataset(section: Mapping[str, Any], where: str) -> Any:
    """Make the dataset that a section describes: this reads, and usually tokenises, all of it.

    Raises:
        ConfigError: naming the section, when it cannot be made, has no rows by index, or none at all.
    """
    dataset = instantiate(section, where)
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ConfigError(
            f"{where}: {type(dataset).__name__} has no length or no rows by index; expected a map-style dataset"
        )
    if not len(dataset):
        raise ConfigError(f"{where} has no rows")
    return dataset


def read_validation(config: FinetuneConfig, model: Model, notes: list[str]) -> Any | None:
    """The validation dataset, whose tokens the model must know; None, with a note, where there is none."""
    if not config.validation_dataset:
        notes.append("no validation_dataset: the validation loss is not measured")
        return None
    dataset = read_dataset(config.validation_dataset, "validation_dataset")
    check_tokens("validation_dataset", dataset, model)
    return dataset


def check_tokens(where: str, dataset: Any, model: Model) -> None:
    """Compare sizes of vocabularies, where both are known.

    Raises:
        ConfigError: when the dataset has token ids that the model has not.
    """
    has, needs = getattr(model.config, "vocab_size", None), getattr(dataset, "vocab_size", None)
    if has is not None and needs is not None and needs > has:
        raise ConfigError(
            f"{where} has token ids up to {needs - 1}, but the model has vocab_size={has}; set model.vocab_size: {needs} "
            "or more"
        )


def tell_tokenizers(datasets: Mapping[str, Any], notes: list[str]) -> None:
    """Note which datasets, by the name of their section, have bytes for tokens because no tokenizer is named."""
    for where, dataset in datasets.items():
        tokenizer = getattr(dataset, "tokenizer", None)
        if tokenizer is not None and tokenizer.name == "bytes":
            notes.append(f"{where}: no tokenizer named, so tokens are bytes (256 ids)")


def loaders_of(config: FinetuneConfig, dataset: Any, validation: Any | None, loss: Loss | None) -> Loaders:
    """How batches are made of the datasets.

    Args:
        config: what is wanted.
        dataset: to train on.
        validation: to measure the validation loss on, if any.
        loss: of the run; None for the model's own.

    Raises:
        DataError: when the dataset has not one batch.
    """
    rows, loader = config.step_scheduler.global_batch_size, config.dataloader
    # a short batch is filled with rows without labels, of which a loss that is a mean makes nothing
    drop_last = loader.drop_last or loss is None
    make = partial(make_loader, seed=config.seed, num_workers=loader.num_workers)
    train = partial(make, dataset, rows, shuffle=loader.shuffle, drop_last=drop_last)
    make_validation = partial(make, validation, rows, shuffle=False, drop_last=loss is None) if validation else None
    return Loaders(train, make_validation, len(train()), drop_last, loss is None)
