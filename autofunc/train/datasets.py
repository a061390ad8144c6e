"""The data of a run: each dataset is read once in a process, and every rank loads its part of each batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from autofunc.config import FinetuneConfig, call, instantiate
from autofunc.data import first_rows, make_loader, num_batches, text_columns
from autofunc.errors import ConfigError, DataError
from autofunc.model import Model
from autofunc.train.labels import inside


class Loaders(NamedTuple):
    """What makes the batches of a run. Each function takes `place` and `places`: which part of every batch, of how many."""

    train: Callable[..., Any]
    validation: Callable[..., Any] | None
    num_batches: int  # of an epoch


def read_dataset(section: Mapping[str, Any], where: str) -> Any:
    """Make the dataset that a section describes: this reads, and usually tokenises, all of it.

    Raises:
        ConfigError: naming the section, when it cannot be made, has no rows by index, none at all, or others than expected.
    """
    dataset = instantiate(section, where)
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ConfigError(
            f"{where}: {type(dataset).__name__} has no length or no rows by index; expected a map-style dataset"
        )
    if not call(partial(len, dataset), where, f"the length of {type(dataset).__name__}"):
        raise ConfigError(f"{where} has no rows")
    try:
        first_rows(dataset, 1)
    except DataError as error:
        raise ConfigError(f"{where}: {error}") from error
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
    has = getattr(model.config, "vocab_size", None)
    needs = max((getattr(each, "vocab_size", None) or 0 for each in inside(dataset)), default=0) or None
    if has is not None and needs is not None and needs > has:
        raise ConfigError(
            f"{where} has token ids up to {needs - 1}, but the model has vocab_size={has}; set model.vocab_size: {needs} "
            "or more"
        )


def tell_tokenizers(datasets: Mapping[str, Any], notes: list[str]) -> None:
    """Note which datasets, by the name of their section, have bytes for tokens because no tokenizer is named."""
    for where, dataset in datasets.items():
        tokenizers = [getattr(each, "tokenizer", None) for each in inside(dataset)]
        if any(getattr(tokenizer, "name", "") == "bytes" for tokenizer in tokenizers):
            notes.append(f"{where}: no tokenizer named, so tokens are bytes (256 ids)")


def tell_rows(dataset: Any, where: str, rows: int, drop_last: bool, notes: list[str]) -> None:
    """Note what of a dataset is not used: columns of text, and rows that `drop_last` leaves out."""
    columns = text_columns(dataset)
    if columns:
        notes.append(f"{where}: text is left out of its rows: {', '.join(columns)}")
    if drop_last and len(dataset) % rows:
        notes.append(f"{where}: drop_last leaves out {len(dataset) % rows} of its {len(dataset)} rows")


def loaders_of(config: FinetuneConfig, dataset: Any, validation: Any | None, notes: list[str]) -> Loaders:
    """How batches are made of the datasets.

    Args:
        config: what is wanted.
        dataset: to train on.
        validation: to measure the validation loss on, if any.
        notes: told what is left out.

    Raises:
        ConfigError: naming the dataset that has not one batch, or whose rows are none.
    """
    steps, loader = config.step_scheduler, config.dataloader
    rows = steps.global_batch_size

    def make(where: str, dataset: Any, shuffle: bool) -> Callable[..., Any]:
        made = partial(
            make_loader, dataset, rows, microbatch=steps.local_batch_size, seed=config.seed, shuffle=shuffle,
            drop_last=loader.drop_last, num_workers=loader.num_workers,
        )  # fmt: skip
        try:
            made()
            tell_rows(dataset, where, rows, loader.drop_last, notes)
        except DataError as error:
            raise ConfigError(f"{where}: {error}") from error
        return made

    train = make("dataset", dataset, loader.shuffle)
    make_validation = make("validation_dataset", validation, False) if validation is not None else None
    return Loaders(train, make_validation, num_batches(len(dataset), rows, loader.drop_last))


def title(dataset: Any) -> str:
    """What a dataset says of itself; else its class and its rows."""
    cls = type(dataset)
    own = any("__repr__" in vars(base) for base in cls.__mro__[:-1])
    return repr(dataset) if own else f"{cls.__module__}.{cls.__qualname__}, {len(dataset):,} rows"
