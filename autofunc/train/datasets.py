"""The data of a run: each dataset is read once in a process, and every rank loads its part of each batch."""

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
    """What makes the batches of a run. Each function takes `place` and `places`: which part of every batch, of how many."""

    train: Callable[..., Any]
    validation: Mapping[str, Callable[..., Any]]  # by the section of the dataset
    num_batches: int  # of an epoch


class Batches(NamedTuple):
    """How rows become batches."""

    rows: int  # over all data parallel ranks
    microbatch: int  # rows of one
    drop_last: bool
    num_workers: int


def batches_of(config: FinetuneConfig) -> Batches:
    """Those that are trained on."""
    steps, loader = config.step_scheduler, config.dataloader
    return Batches(steps.global_batch_size, steps.local_batch_size, loader.drop_last, loader.num_workers)


def validation_batches_of(config: FinetuneConfig) -> Batches:
    """Those of validation: as many microbatches as in training, which may have another number of rows."""
    own, trained = config.validation_dataloader, batches_of(config)
    microbatch = own.batch_size or trained.microbatch
    return Batches(
        trained.rows // trained.microbatch * microbatch,
        microbatch,
        trained.drop_last if own.drop_last is None else own.drop_last,
        trained.num_workers if own.num_workers is None else own.num_workers,
    )


def read_dataset(section: Mapping[str, Any], where: str, loader: Dataloader) -> Any:
    """Make the dataset that a section describes: this reads, and usually tokenises, all of it.

    Args:
        section: that names it.
        where: the key of the section, for messages.
        loader: says whether its rows are filled up.

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
    if loader.pad_seq_len_divisible is not None or loader.pad_seq_len_to is not None:
        dataset = Padded(dataset, Padding(loader.pad_seq_len_divisible, tuple(sorted(loader.pad_seq_len_to or ()))))
    try:
        first_rows(dataset, 1)
    except DataError as error:
        raise ConfigError(f"{where}: {error}") from error
    return dataset


class Datasets:
    """The datasets of a configuration: sections that say the same are one dataset, which is read once.

    Args:
        config: what is wanted.
    """

    def __init__(self, config: FinetuneConfig) -> None:
        self._sections, self._loader = config.validations, config.dataloader
        self._read: list[tuple[Mapping[str, Any], Any]] = []
        # what is only measured has no other (`evaluate.to_evaluate`)
        measured = (name for name, section in self._sections.items() if section is config.dataset)
        self.where = next(measured, "dataset")  # the section of `train`, for messages
        self.train = self._of(config.dataset, self.where)

    def validation(self, model: Model, notes: list[str]) -> dict[str, Any]:
        """The validation datasets by section, whose tokens the model must know; a note where there are none."""
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
    """Note what a dataset says, and what of it is not used: columns of text, and rows that `drop_last` leaves out."""
    notes += [f"{where}: {note}" for each in inside(dataset) if isinstance(each, InstructionRows) for note in each.notes]
    columns = text_columns(dataset)
    if columns:
        notes.append(f"{where}: text is left out of its rows: {', '.join(columns)}")
    if drop_last and len(dataset) % rows:
        notes.append(f"{where}: drop_last leaves out {len(dataset) % rows} of its {len(dataset)} rows")


def loaders_of(
    config: FinetuneConfig, where: str, dataset: Any, validation: Mapping[str, Any], notes: list[str]
) -> Loaders:  # fmt: skip
    """How batches are made of the datasets.

    Args:
        config: what is wanted.
        where: the section of the dataset to train on.
        dataset: that one.
        validation: to measure on, by section.
        notes: told what is left out.

    Raises:
        ConfigError: naming the dataset that has not one batch, or whose rows are none.
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
    """What a dataset says of itself; else its class and its rows."""
    if isinstance(dataset, Padded):
        padding = dataset.padding
        to = padding.multiple_of or ", ".join(map(str, padding.lengths))
        return f"{title(dataset.dataset)}, filled up to {'multiples of ' if padding.multiple_of else ''}{to}"
    cls = type(dataset)
    own = any("__repr__" in vars(base) for base in cls.__mro__[:-1])
    return repr(dataset) if own else f"{cls.__module__}.{cls.__qualname__}, {len(dataset):,} rows"
