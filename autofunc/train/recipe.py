"""From a checked configuration to everything a run needs, with every mistake found before a process is started."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from autofunc.batch import split_batch
from autofunc.config import FinetuneConfig, check_arguments, instantiate, resolve_target
from autofunc.data import first_rows, make_loader
from autofunc.engine import EngineOptions, require_compiler
from autofunc.errors import AutofuncError, ConfigError, ModelError
from autofunc.losses import Loss
from autofunc.model import Model
from autofunc.optim import Optimizer, optimizer
from autofunc.schedule import Schedule
from autofunc.shard import Sharding
from autofunc.splitting import Stage, infer_boundaries, layer_costs
from autofunc.train.axes import Axes, axes_of, sharding_of
from autofunc.train.layout import LayerCosts, is_auto, stages_and_schedule
from autofunc.train.model import build_loss, build_model
from autofunc.tree import to_tensordict


@dataclass(frozen=True)
class Recipe:
    """A run: what is trained, on what, how. Holds no weights and no process group."""

    model: Model
    stages: tuple[Stage, ...]
    axes: Axes  # sizes of the mesh
    sharding: Sharding
    schedule: Schedule  # to train with; of a run that searches, to measure costs with
    searches: bool  # whether a schedule is searched for when the run starts
    search_budget: int | None  # bytes of residuals that it keeps within; None: as many activations as 1F1B
    options: EngineOptions
    loss: Loss | None  # None: the model's own
    optimizer: Optimizer
    dataset: Any
    validation_dataset: Any | None
    make_train_loader: Callable[..., Any]  # of (place=, places=): which part of each batch
    make_validation_loader: Callable[..., Any] | None
    num_steps: int
    val_every_steps: int | None
    max_norm: float | None  # of the gradients
    seed: int
    rows: int  # of a batch, over all data parallel ranks
    notes: tuple[str, ...]  # what the user should know about how the configuration was read

    @property
    def init_seed(self) -> int | None:
        """What initial weights are made from; None where the model has all of its own."""
        return self.seed if self.model.uses_seed else None

    def example(self) -> dict[str, Any]:
        """A batch of the dataset's first rows, as many as a data parallel rank has: to measure on."""
        return first_rows(self.dataset, self.rows // self.axes.dp)


def prepare(
    config: FinetuneConfig,
    num_processes: int | None = None,
    *,
    notes: Sequence[str] = (),
    layer_costs: LayerCosts = layer_costs,
) -> Recipe:
    """Build a recipe and try it on fake tensors.

    Args:
        config: what is wanted.
        num_processes: how many there are, or were asked for; None lets the configuration say.
        notes: what the user should know already.
        layer_costs: what stages are balanced by.

    Raises:
        AutofuncError: naming the key, what was given and what would work.
    """
    told = list(notes)
    axes = axes_of(config, num_processes)
    dataset = instantiate(config.dataset, "dataset")
    _check_rows("dataset", dataset)
    model = build_model(config, dataset)
    _check_tokens("dataset", dataset, model)
    loss = build_loss(config, model, dataset, told)
    stages, schedule = stages_and_schedule(config, axes, model, loss, dataset, told, layer_costs)
    model = stages[0].model
    sharding = sharding_of(config, axes, told)
    options, search_budget = _engine_options(config)
    searches = is_auto(config) and schedule.num_ranks > 1
    if search_budget is not None and not searches:
        told.append("pp_size is 1, so memory_budget has no search to limit")
    make_optimizer = _optimizer(config)

    validation = instantiate(config.validation_dataset, "validation_dataset") if config.validation_dataset else None
    if validation is None:
        told.append("no validation_dataset: the validation loss is not measured")
    else:
        _check_rows("validation_dataset", validation)
        _check_tokens("validation_dataset", validation, model)
    for where, given in (("dataset", dataset), ("validation_dataset", validation)):
        tokenizer = getattr(given, "tokenizer", None)
        if tokenizer is not None and tokenizer.name == "bytes":
            told.append(f"{where}: no tokenizer named, so tokens are bytes (256 ids)")

    rows, loader = config.step_scheduler.global_batch_size, config.dataloader
    # a short batch is filled with rows without labels, of which a loss that is a mean makes nothing
    drop_last = loader.drop_last or loss is None
    make = partial(make_loader, seed=config.seed, num_workers=loader.num_workers)
    make_train = partial(make, dataset, rows, shuffle=loader.shuffle, drop_last=drop_last)
    make_validation = partial(make, validation, rows, shuffle=False, drop_last=loss is None) if validation else None
    steps = len(make_train()) * config.step_scheduler.num_epochs
    for where, given in (("dataset", dataset), ("validation_dataset", validation)):
        if given is not None:
            dropped = drop_last if where == "dataset" else loss is None
            _try_on_fake_tensors(where, given, rows, axes.dp, dropped, stages, schedule, loss)
    return Recipe(
        model=model,
        stages=tuple(stages),
        axes=axes,
        sharding=sharding,
        schedule=schedule,
        searches=searches,
        search_budget=search_budget if searches else None,
        options=options,
        loss=loss,
        optimizer=make_optimizer,
        dataset=dataset,
        validation_dataset=validation,
        make_train_loader=make_train,
        make_validation_loader=make_validation,
        num_steps=min(steps, config.step_scheduler.max_steps or steps),
        val_every_steps=config.step_scheduler.val_every_steps,
        max_norm=config.clip_grad_norm.max_norm if config.clip_grad_norm is not None else None,
        seed=config.seed,
        rows=rows,
        notes=tuple(dict.fromkeys(told)),
    )


def default_output_dir(config_path: str | Path) -> Path:
    """runs/<name of the file>, or with a number after it where that is taken: no run overwrites another."""
    base = Path("runs") / Path(config_path).stem
    candidates = [base, *(base.with_name(f"{base.name}-{number}") for number in range(2, 10_000))]
    return next(candidate for candidate in candidates if not candidate.exists())


def _engine_options(config: FinetuneConfig) -> tuple[EngineOptions, int | None]:
    """How stages are differentiated, and the bytes that a search for a schedule keeps within."""
    wanted = config.distributed
    remat, budget = wanted.remat, wanted.memory_budget
    if remat == "auto" and budget is None:
        raise ConfigError(
            "distributed: remat=auto needs memory_budget, the bytes that may be alive on a rank, such as 2GiB; "
            "remat: layer and remat: stage need none"
        )
    if budget is not None and remat != "auto" and not is_auto(config):
        raise ConfigError(
            f"distributed: memory_budget={budget} goes with remat: auto, which chooses what to compute again within it, or "
            f"with schedule: auto, which searches within it; got remat={remat or 'none'} and schedule={wanted.schedule}"
        )
    search_budget = budget if remat != "auto" else None
    if search_budget is not None and wanted.engine != "graph":
        raise ConfigError(
            f"distributed: memory_budget={budget} with schedule auto counts the bytes of captured stages, so it needs "
            f"engine: graph; got {wanted.engine}"
        )
    try:
        options = EngineOptions(wanted.engine, wanted.compile, remat, budget if remat == "auto" else None)
    except AutofuncError as error:
        raise ConfigError(f"distributed: {error}") from error
    if options.compile:
        try:
            require_compiler()
        except AutofuncError as error:
            raise ConfigError(f"distributed.compile: {error}") from error
    return options, search_budget


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


def _check_rows(where: str, dataset: Any) -> None:
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ConfigError(
            f"{where}: {type(dataset).__name__} has no length or no rows by index; expected a map-style dataset"
        )
    if not len(dataset):
        raise ConfigError(f"{where} has no rows")


def _check_tokens(where: str, dataset: Any, model: Model) -> None:
    has, needs = getattr(model.config, "vocab_size", None), getattr(dataset, "vocab_size", None)
    if has is not None and needs is not None and needs > has:
        raise ConfigError(
            f"{where} has token ids up to {needs - 1}, but the model has vocab_size={has}; set model.vocab_size: {needs} "
            "or more"
        )


def _try_on_fake_tensors(
    where: str,
    dataset: Any,
    rows: int,
    dp: int,
    drop_last: bool,
    stages: list[Stage],
    schedule: Schedule,
    loss: Loss | None,
) -> None:
    """Run the model on a first and a last batch without allocating: finds wrong shapes, keys and lengths in time."""
    last = len(dataset) % rows
    for start in [0, len(dataset) - last] if last and not drop_last else [0]:
        batch = first_rows(dataset, rows // dp, start)
        try:
            microbatch = split_batch(batch, schedule.num_microbatches, key=(0, 0))[0]
            infer_boundaries(stages, {}, microbatch, loss)
        except AutofuncError as error:
            raise ConfigError(f"the model on a batch of {where}: {error}") from error
