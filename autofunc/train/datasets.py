"""The data of a run: a process reads each dataset once, and every rank loads its part of each batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from autofunc.config import FinetuneConfig, call, instantiate
from autofunc.config.dataloaders import Dataloader
from autofunc.data import InstructionRows, Padded, Padding, first_rows, make_loader, num_batches, text_columns
from autofunc.errors import ConfigError, DataError
from autofunc.model import Model
from autofunc.train.labels import inside


class Loaders(NamedTuple):
    """Functions that make a run's batches. Each takes `place` and `places`: which part of every batch, out of how many."""

    train: Callable[..., Any]
    validation: Mapping[str, Callable[..., Any]]  # by the dataset's section
    num_batches: int  # per epoch


class Batches(NamedTuple):
    """Sizes of batches."""

    rows: int  # per batch, over all data parallel ranks
    microbatch: int  # rows per microbatch
    drop_last: bool
    num_workers: int


def batches_of(config: FinetuneConfig) -> Batches:
    """Return the sizes of training batches."""
    steps, loader = config.step_scheduler, config.dataloader
    return Batches(steps.global_batch_size, steps.local_batch_size, loader.drop_last, loader.num_workers)


def validation_batches_of(config: FinetuneConfig) -> Batches:
    """Return the sizes of validation batches: as many microbatches as in training, possibly of another number of rows."""
    own, trained = config.validation_dataloader, batches_of(config)
    microbatch = own.batch_size or trained.microbatch
    return Batches(
        trained.rows // trained.microbatch * microbatch,
        microbatch,
        trained.drop_last if own.drop_last is None else own.drop_last,
        trained.num_workers if own.num_workers is None else own.num_workers,
    )


def read_dataset(section: Mapping[str, Any], where: str, loader: Dataloader) -> Any:
    """Build the dataset of a section; this reads and usually tokenises all of it.

    Args:
        section: the dataset's section.
        where: its key, for messages.
        loader: tells whether rows are padded.

    Raises:
        ConfigError: naming the section, if the dataset cannot be built, is not map-style, is empty or has unexpected rows.
    """
    dataset = instantiate(section, where)
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ConfigError(
            f"{where}: {type(dataset).__name__} has no length or no rows by index; expected a map-style dataset"
        )
    if not call(partial(len, dataset), where, f"the length of {type(dataset).__name__}"):
        raise ConfigError(f"{where} has no rows")
    if loader.pad_seq_len_divisible is not None or loader.pad_seq_len_to is not None:
        dataset = Padded(dataset, Padding(loader.pad_seq_len_divisible, tuple(sorted(loader.pad_seq_len_to or ()))))
    try:
        first_rows(dataset, 1)
    except DataError as error:
        raise ConfigError(f"{where}: {error}") from error
    return dataset


class Datasets:
    """The datasets of a configuration; equal sections share one dataset, which is read once.

    Args:
        config: the configuration.
    """

    def __init__(self, config: FinetuneConfig) -> None:
        self._sections, self._loader = config.validations, config.dataloader
        self._read: list[tuple[Mapping[str, Any], Any]] = []
        # evaluation has no training dataset (`evaluate.to_evaluate`)
        measured = (name for name, section in self._sections.items() if section is config.dataset)
        self.where = next(measured, "dataset")  # the section of the dataset to train on, for messages
        self.train = self._of(config.dataset, self.where)

    def validation(self, model: Model, notes: list[str]) -> dict[str, Any]:
        """Return the validation datasets by section, after checking their tokens; add a note if there are none."""
        if not self._sections:
            notes.append("no validation_dataset: the validation loss is not measured")
        found = {name: self._of(section, name) for name, section in self._sections.items()}
        for name, dataset in found.items():
            check_tokens(name, dataset, model)
        return found

    def _of(self, section: Mapping[str, Any], where: str) -> Any:
        known = next((dataset for same, dataset in self._read if same == section), None)
        if known is None:
            known = read_dataset(section, where, self._loader)
            self._read.append((section, known))
        return known


def check_tokens(where: str, dataset: Any, model: Model) -> None:
    """Compare the vocabulary sizes of dataset and model, if both are known.

    Raises:
        ConfigError: if the dataset has token ids outside the model's vocabulary.
    """
    has = getattr(model.config, "vocab_size", None)
    needs = max((getattr(each, "vocab_size", None) or 0 for each in inside(dataset)), default=0) or None
    if has is not None and needs is not None and needs > has:
        raise ConfigError(
            f"{where} has token ids up to {needs - 1}, but the model has vocab_size={has}; set model.vocab_size: {needs} "
            "or more"
        )


def tell_tokenizers(datasets: Mapping[str, Any], notes: list[str]) -> None:
    """Note which datasets, by section, use bytes as tokens because no tokenizer is named."""
    for where, dataset in datasets.items():
        tokenizers = [getattr(each, "tokenizer", None) for each in inside(dataset)]
        if any(getattr(tokenizer, "name", "") == "bytes" for tokenizer in tokenizers):
            notes.append(f"{where}: no tokenizer named, so tokens are bytes (256 ids)")


def tell_rows(dataset: Any, where: str, rows: int, drop_last: bool, notes: list[str]) -> None:
    """Note what of a dataset goes unused: text columns, and rows that `drop_last` drops."""
    notes += [f"{where}: {note}" for each in inside(dataset) if isinstance(each, InstructionRows) for note in each.notes]
    columns = text_columns(dataset)
    if columns:
        notes.append(f"{where}: rows drop their text: {', '.join(columns)}")
    if drop_last and len(dataset) % rows:
        notes.append(f"{where}: drop_last drops {len(dataset) % rows} of its {len(dataset)} rows")


def loaders_of(
    config: FinetuneConfig, where: str, dataset: Any, validation: Mapping[str, Any], notes: list[str]
) -> Loaders:  # fmt: skip
    """Return the functions that make batches of the datasets.

    Args:
        config: the configuration.
        where: the section of the dataset to train on.
        dataset: to train on.
        validation: datasets to measure on, by section.
        notes: gains a line for each part that goes unused.

    Raises:
        ConfigError: naming the dataset, if it has no full batch or its rows are unusable.
    """

    def make(where: str, dataset: Any, shuffle: bool, batches: Batches) -> Callable[..., Any]:
        made = partial(
            make_loader, dataset, batches.rows, microbatch=batches.microbatch, seed=config.seed, shuffle=shuffle,
            drop_last=batches.drop_last, num_workers=batches.num_workers,
        )  # fmt: skip
        try:
            made()
            tell_rows(dataset, where, batches.rows, batches.drop_last, notes)
        except DataError as error:
            raise ConfigError(f"{where}: {error}") from error
        return made

    training, validating = batches_of(config), validation_batches_of(config)
    train = make(where, dataset, config.dataloader.shuffle, training)
    makes = {name: make(name, each, False, validating) for name, each in validation.items()}
    return Loaders(train, makes, num_batches(len(dataset), training.rows, training.drop_last))


def title(dataset: Any) -> str:
    """Return a dataset's own description, else its class and number of rows."""
    if isinstance(dataset, Padded):
        padding = dataset.padding
        to = padding.multiple_of or ", ".join(map(str, padding.lengths))
        return f"{title(dataset.dataset)}, padded to {'multiples of ' if padding.multiple_of else ''}{to}"
    cls = type(dataset)
    own = any("__repr__" in vars(base) for base in cls.__mro__[:-1])
    return repr(dataset) if own else f"{cls.__module__}.{cls.__qualname__}, {len(dataset):,} rows"
