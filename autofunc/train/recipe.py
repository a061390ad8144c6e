"""From a checked configuration to everything a run needs, with every mistake found before a process is started."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from autofunc import losses
from autofunc.batch import split_batch
from autofunc.config import FinetuneConfig, check_arguments, instantiate, resolve_target
from autofunc.data import collate, make_loader
from autofunc.errors import AutofuncError, ConfigError, ModelError, ScheduleError
from autofunc.losses import Loss
from autofunc.model import Model
from autofunc.optim import Optimizer, optimizer
from autofunc.schedule import Schedule, build, default_stages_per_rank, is_looped, is_named
from autofunc.splitting import Stage, infer_boundaries, split
from autofunc.tree import to_tensordict


@dataclass(frozen=True)
class Recipe:
    """A run: what is trained, on what, how. Holds no weights and no process group."""

    model: Model
    stages: tuple[Stage, ...]
    schedule: Schedule
    engine: str
    loss: Loss
    optimizer: Optimizer
    dataset: Any
    validation_dataset: Any | None
    make_train_loader: Callable[[], Any]
    make_validation_loader: Callable[[], Any] | None
    num_steps: int
    val_every_steps: int | None
    seed: int
    notes: tuple[str, ...]  # what the user should know about how the configuration was read

    @property
    def num_ranks(self) -> int:
        """Processes the run needs."""
        return self.schedule.num_ranks


def prepare(config: FinetuneConfig) -> Recipe:
    """Build a recipe and try it on fake tensors.

    Raises:
        AutofuncError: naming the key, what was given and what would work.
    """
    notes: list[str] = []
    model = instantiate(config.model, "model")
    if not isinstance(model, Model):
        raise ConfigError(f"model: {config.model['_target_']} returned {type(model).__name__}; expected an af.Model")
    stages, schedule = _stages_and_schedule(config, model, notes)
    loss = _loss(config)
    make_optimizer = _optimizer(config)

    dataset = instantiate(config.dataset, "dataset")
    validation = instantiate(config.validation_dataset, "validation_dataset") if config.validation_dataset else None
    if validation is None:
        notes.append("no validation_dataset: the validation loss is not measured")
    for where, given in (("dataset", dataset), ("validation_dataset", validation)):
        if given is not None:
            _check_dataset(where, given, model)
        tokenizer = getattr(given, "tokenizer", None)
        if tokenizer is not None and tokenizer.name == "bytes":
            notes.append(f"{where}: no tokenizer named, so tokens are bytes (256 ids)")

    rows, loader = config.step_scheduler.global_batch_size, config.dataloader
    make_train = partial(
        make_loader, dataset, rows, seed=config.seed, shuffle=loader.shuffle, drop_last=loader.drop_last,
        num_workers=loader.num_workers,
    )  # fmt: skip
    make_validation = (
        partial(make_loader, validation, rows, seed=config.seed, shuffle=False, num_workers=loader.num_workers)
        if validation is not None
        else None
    )
    steps = len(make_train()) * config.step_scheduler.num_epochs
    for where, given in (("dataset", dataset), ("validation_dataset", validation)):
        if given is not None:
            drop_last = loader.drop_last and where == "dataset"
            _try_on_fake_tensors(where, given, rows, drop_last, stages, schedule, loss)
    return Recipe(
        model=model,
        stages=tuple(stages),
        schedule=schedule,
        engine=config.distributed.engine,
        loss=loss,
        optimizer=make_optimizer,
        dataset=dataset,
        validation_dataset=validation,
        make_train_loader=make_train,
        make_validation_loader=make_validation,
        num_steps=min(steps, config.step_scheduler.max_steps or steps),
        val_every_steps=config.step_scheduler.val_every_steps,
        seed=config.seed,
        notes=tuple(dict.fromkeys(notes)),
    )


def default_output_dir(config_path: str | Path) -> Path:
    """runs/<name of the file>, or with a number after it where that is taken: no run overwrites another."""
    base = Path("runs") / Path(config_path).stem
    candidates = [base, *(base.with_name(f"{base.name}-{number}") for number in range(2, 10_000))]
    return next(candidate for candidate in candidates if not candidate.exists())


def _count_microbatches(config: FinetuneConfig) -> int:
    rows, per_microbatch = config.step_scheduler.global_batch_size, config.step_scheduler.local_batch_size
    if rows % per_microbatch:
        fitting = [size for size in range(1, rows + 1) if rows % size == 0]
        nearest = min(fitting, key=lambda size: abs(size - per_microbatch))
        raise ConfigError(
            f"step_scheduler: global_batch_size={rows} is not divisible by local_batch_size={per_microbatch} (the rows of "
            f"one microbatch); the nearest that divides it is {nearest}"
        )
    return rows // per_microbatch


def _stages_and_schedule(config: FinetuneConfig, model: Model, notes: list[str]) -> tuple[list[Stage], Schedule]:
    """The stages that split_points give, and the schedule with as many of them on each rank."""
    num_microbatches = _count_microbatches(config)
    name, num_ranks, points = config.distributed.schedule, config.distributed.pp_size, config.distributed.split_points
    if not is_named(name) or "." in name:
        return _stages_and_own_schedule(name, num_ranks, num_microbatches, model, points)
    try:
        per_rank = default_stages_per_rank(name)
    except ScheduleError as error:
        raise ConfigError(f"distributed.schedule: {error}") from error
    try:
        stages = split(model, num_ranks * per_rank if points is None else points)
    except AutofuncError as error:
        raise ConfigError(f"distributed.split_points: {error}") from error
    if num_ranks == 1 and per_rank == 1 and len(stages) > 1:
        notes.append("pp_size is 1, so the model is one stage and split_points are not used")
        stages = split(model, 1)
    smallest = num_ranks * per_rank
    if len(stages) % num_ranks or len(stages) < smallest or (len(stages) > smallest and not is_looped(name)):
        multiple = " (or a larger multiple)" if is_looped(name) else ""
        raise ConfigError(
            f"distributed: pp_size={num_ranks} with schedule {name} needs {smallest} stages{multiple}, but "
            f"split_points={points} gives {len(stages)}; give {smallest - 1} split points, or set pp_size: "
            f"{max(len(stages) // per_rank, 1)}"
        )
    try:
        schedule = build(
            name,
            num_ranks=num_ranks,
            num_microbatches=num_microbatches,
            stages_per_rank=len(stages) // num_ranks,
        )
    except ScheduleError as error:
        raise ConfigError(f"distributed.schedule: {error}") from error
    return stages, schedule


def _stages_and_own_schedule(
    name: str, num_ranks: int, num_microbatches: int, model: Model, points: list[str] | int | None
) -> tuple[list[Stage], Schedule]:
    """The schedule of a table or of a user's function, and the stages it is for."""
    source = resolve_target(name, "distributed.schedule") if is_named(name) else name
    try:
        schedule = build(source, num_ranks=num_ranks, num_microbatches=num_microbatches)
    except AutofuncError as error:
        raise ConfigError(f"distributed.schedule: {error}") from error
    except Exception as error:
        raise ConfigError(f"distributed.schedule: {name} failed: {type(error).__name__}: {error}") from error
    try:
        stages = split(model, schedule.num_stages if points is None else points)
    except AutofuncError as error:
        raise ConfigError(f"distributed.split_points: {error}") from error
    if len(stages) != schedule.num_stages:
        raise ConfigError(
            f"distributed: schedule {name} has {schedule.num_stages} stages, but split_points={points} gives "
            f"{len(stages)}; give {schedule.num_stages - 1} split points"
        )
    return stages, schedule


def _loss(config: FinetuneConfig) -> Loss:
    if config.loss_fn is None:
        return losses.causal_lm
    loss = resolve_target(config.loss_fn["_target_"], "loss_fn._target_")
    options = {key: value for key, value in config.loss_fn.items() if key != "_target_"}
    check_arguments(loss, options, "loss_fn", config.loss_fn["_target_"], given_later=2)
    return partial(loss, **options) if options else loss


def _optimizer(config: FinetuneConfig) -> Optimizer:
    name = config.optimizer["_target_"]
    factory = resolve_target(name, "optimizer._target_")
    options = {key: value for key, value in config.optimizer.items() if key != "_target_"}
    check_arguments(factory, options, "optimizer", name, given_later=1)
    made = optimizer(factory, **options)
    scratch = to_tensordict({"weight": torch.zeros(2, 2)})
    try:
        made.update(scratch.clone(), made.init(scratch), scratch)
    except ModelError as error:
        raise ConfigError(f"optimizer: {error}") from error
    except Exception as error:
        raise ConfigError(f"optimizer: {name} cannot update a parameter: {type(error).__name__}: {error}") from error
    return made


def _check_dataset(where: str, dataset: Any, model: Model) -> None:
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ConfigError(
            f"{where}: {type(dataset).__name__} has no length or no rows by index; expected a map-style dataset"
        )
    if not len(dataset):
        raise ConfigError(f"{where} has no rows")
    has, needs = getattr(model.config, "vocab_size", None), getattr(dataset, "vocab_size", None)
    if has is not None and needs is not None and needs > has:
        raise ConfigError(
            f"{where} has token ids up to {needs - 1}, but the model has vocab_size={has}; set model.vocab_size: {needs} "
            "or more"
        )


def _try_on_fake_tensors(
    where: str, dataset: Any, rows: int, drop_last: bool, stages: list[Stage], schedule: Schedule, loss: Loss
) -> None:
    """Run the model on a first and a last batch without allocating: finds wrong shapes, keys and lengths in time."""
    last = len(dataset) % rows
    indices = [range(min(rows, len(dataset)))] + (
        [range(len(dataset) - last, len(dataset))] if last and not drop_last else []
    )
    for chosen in indices:
        batch = collate([dataset[index] for index in chosen], rows)
        try:
            microbatch = split_batch(batch, schedule.num_microbatches, key=(0, 0))[0]
            infer_boundaries(stages, {}, microbatch, loss)
        except AutofuncError as error:
            raise type(error)(f"the model on a batch of {where}: {error}") from error
