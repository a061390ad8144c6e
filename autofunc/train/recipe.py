"""Turn a checked configuration into everything a run needs, finding every mistake before processes start."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autofunc.automodel import check_writable
from autofunc.batch import Microbatch, split_batch
from autofunc.config import FinetuneConfig, StepScheduler, check_targets, refusing_exit
from autofunc.config.schema import EarlyStopping
from autofunc.config.updates import Ema
from autofunc.data import STACKED, first_rows
from autofunc.engine import EngineOptions, require_compiler
from autofunc.engine.recordable import check_axes
from autofunc.errors import AutofuncError, ConfigError
from autofunc.losses import Loss
from autofunc.model import Model
from autofunc.optim import LearningRate, Optimizer
from autofunc.runtime.cuda_graphs import check_recording
from autofunc.runtime.pair_groups import Transfers
from autofunc.schedule import Schedule
from autofunc.shard import Sharding
from autofunc.shown import quoted
from autofunc.splitting import Stage, layer_costs
from autofunc.timing import clock
from autofunc.train.axes import Axes, axes_of, setting_alone, sharding_of
from autofunc.train.datasets import (
    Datasets,
    batches_of,
    check_tokens,
    loaders_of,
    tell_tokenizers,
    validation_batches_of,
)
from autofunc.train.device import on_gpus
from autofunc.train.layout import LayerCosts, count_microbatches, is_auto, stages_and_schedule
from autofunc.train.learning_rate import learning_rate_of
from autofunc.train.model import build_loss, build_metrics, build_model
from autofunc.train.nonfinite import Action
from autofunc.train.optimizer import build_optimizer, check_optimizer, try_optimizer
from autofunc.train.packed import check_positions_are_read
from autofunc.train.trial import Trial


@dataclass(frozen=True)
class Recipe:
    """A run: what to train, on what data, and how. Holds no weights and no process group."""

    model: Model
    stages: tuple[Stage, ...]
    axes: Axes  # sizes of the mesh
    sharding: Sharding
    transfers: Transfers
    schedule: Schedule  # to train with; if the run searches for one, to measure costs with
    searches: bool  # search for a schedule when the run starts
    search_budget: int | None  # limit of residuals in bytes; None limits activations to those of 1F1B
    options: EngineOptions
    loss: Loss | None  # None: the model's own
    optimizer: Optimizer
    ema: Ema | None  # moving average of the parameters
    lr_at: LearningRate | None  # learning rate by step; None: the optimizer's constant
    dataset: Any
    validation_datasets: Mapping[str, Any]  # by section
    make_train_loader: Callable[..., Any]  # called with place= and places=: which part of each batch
    validation_loaders: Mapping[str, Callable[..., Any]]  # likewise, by section
    leading_validation: str | None  # the section that gives the run's validation loss
    metrics: Mapping[str, Loss]  # measured in validation, by name
    early_stopping: EarlyStopping | None
    num_steps: int
    val_every_steps: int | None
    gc_every_steps: int | None  # None leaves garbage collection to Python
    max_norm: float | None  # of the gradients
    nonfinite: Action  # for steps that are not finite
    max_skips: int  # of consecutive such steps
    peak_tflops: float | None  # of a device, if configured
    seed: int
    rows: int  # per batch, over all data parallel ranks
    microbatch_rows: int
    validation_microbatch_rows: int
    notes: tuple[str, ...]  # about how the configuration was read, for the user

    @property
    def init_seed(self) -> int | None:
        """Seed of initial weights; None if the model brings all of its weights."""
        return self.seed if self.model.uses_seed else None

    def example(self) -> dict[str, Any]:
        """Return the dataset's first rows, as many as a data parallel rank gets per step, to measure on."""
        return first_rows(self.dataset, self.rows // self.axes.dp)

    @property
    def validates_average(self) -> bool:
        """Whether validation uses the moving average of the parameters."""
        return self.ema is not None and self.ema.validation

    def microbatch(self, key: tuple[int, int]) -> Microbatch:
        """Return the first microbatch of `example`, for the step with this key (seed, step)."""
        name, count = self.model.key_name, self.schedule.num_microbatches
        return split_batch(self.example(), count, key=key, batch_dims=STACKED, key_name=name)[0]


@refusing_exit()
def prepare(
    config: FinetuneConfig,
    num_processes: int | None = None,
    *,
    notes: Sequence[str] = (),
    layer_costs: LayerCosts = layer_costs,
    checked: bool = False,
) -> Recipe:
    """Build a recipe and try it on fake tensors. Reads each dataset once.

    Args:
        config: the configuration.
        num_processes: running or requested processes; None derives it from the configuration.
        notes: already known, to be shown to the user.
        layer_costs: balances stages.
        checked: the process that started this one has tried the recipe.

    Raises:
        AutofuncError: naming the key, the value given and what would work.
    """
    all_notes = list(notes)
    axes = axes_of(config, num_processes)
    num_microbatches = count_microbatches(config, axes.dp)
    options, search_budget = _engine_options(config)
    if options.records:
        _check_recording(config, axes)
    check_targets(config)
    sharding = sharding_of(config, axes, all_notes)
    optimizer = build_optimizer(config)
    if not checked:
        try_optimizer(optimizer)
    datasets = Datasets(config)
    dataset, where = datasets.train, datasets.where
    clock.done("reading the dataset")
    model = build_model(config, dataset)
    clock.done("making the model")
    all_notes += model.notes
    check_optimizer(optimizer, model)
    check_tokens(where, dataset, model)
    loss = build_loss(config, model, where, dataset, all_notes, checked=checked)
    clock.done("trying the model and its loss")
    stages, schedule = stages_and_schedule(config, num_microbatches, model, loss, dataset, all_notes, layer_costs)
    searches = is_auto(config) and schedule.num_ranks > 1
    if search_budget is not None and not searches:
        all_notes.append("pp_size is 1, so memory_budget has no search to limit")
    clock.done("cutting stages")
    validation = datasets.validation(stages[0].model, all_notes)
    clock.done("reading the validation datasets")
    tell_tokenizers({where: dataset, **validation}, all_notes)
    loaders = loaders_of(config, where, dataset, validation, all_notes)
    training, validating = batches_of(config), validation_batches_of(config)
    if not checked:
        trial = Trial(stages, loss, setting_alone(axes, sharding))
        trial.run(where, dataset, training)
        for name, each in validation.items():
            trial.run(name, each, validating)
        for name, each in {where: dataset, **validation}.items():
            check_positions_are_read(stages, loss, name, each)
    clock.done("trying the stages")
    if config.export is not None:
        _check_export(config, stages[0].model)
    metrics = build_metrics(config, stages[0].model, loss, {} if checked else validation, validating.microbatch)
    steps = config.step_scheduler
    num_steps = _num_steps(steps, loaders.num_batches, all_notes)
    return Recipe(
        model=stages[0].model,
        stages=tuple(stages),
        axes=axes,
        sharding=sharding,
        transfers=Transfers(**config.distributed.transfers.model_dump()),
        schedule=schedule,
        searches=searches,
        search_budget=search_budget if searches else None,
        options=options,
        loss=loss,
        optimizer=optimizer,
        ema=config.ema,
        lr_at=learning_rate_of(config, optimizer, num_steps),
        dataset=dataset,
        validation_datasets=validation,
        make_train_loader=loaders.train,
        validation_loaders=loaders.validation,
        leading_validation=config.leading_validation,
        metrics=metrics,
        early_stopping=config.early_stopping,
        num_steps=num_steps,
        val_every_steps=steps.val_every_steps,
        gc_every_steps=steps.gc_every_steps,
        max_norm=config.clip_grad_norm.max_norm if config.clip_grad_norm is not None else None,
        nonfinite=config.nonfinite,
        max_skips=config.max_skips,
        peak_tflops=config.peak_tflops,
        seed=config.seed,
        rows=training.rows,
        microbatch_rows=training.microbatch,
        validation_microbatch_rows=validating.microbatch,
        notes=tuple(dict.fromkeys(all_notes)),
    )


def _check_export(config: FinetuneConfig, model: Model) -> None:
    """Refuse, before training, a model that cannot be exported."""
    assert config.export is not None
    if Path(config.export).is_absolute() or ".." in Path(config.export).parts:
        raise ConfigError(f"export: {quoted(config.export)} is not in output_dir; name a folder in it, such as model")
    try:
        check_writable(model)
    except AutofuncError as error:
        raise ConfigError(f"export: {error}") from error


def _num_steps(steps: StepScheduler, of_an_epoch: int, notes: list[str]) -> int:
    """Return the number of steps: `max_steps`, unless `num_epochs` ends earlier."""
    if steps.max_steps is None or steps.num_epochs is None:
        return steps.max_steps or of_an_epoch * (steps.num_epochs or 1)
    of_epochs = of_an_epoch * steps.num_epochs
    if of_epochs < steps.max_steps:
        notes.append(
            f"step_scheduler: num_epochs={steps.num_epochs} ends after {of_epochs} steps, before max_steps="
            f"{steps.max_steps}"
        )
    return min(of_epochs, steps.max_steps)


def _engine_options(config: FinetuneConfig) -> tuple[EngineOptions, int | None]:
    """Return the engine's options, and the byte limit of a schedule search."""
    wanted = config.distributed
    remat, budget = wanted.remat, wanted.memory_budget
    if remat == "auto" and budget is None:
        raise ConfigError(
            "distributed: remat=auto needs memory_budget, the most bytes that may be live on a rank, such as 2GiB; "
            "remat: layer and remat: stage do not"
        )
    if budget is not None and remat != "auto" and not is_auto(config):
        raise ConfigError(
            f"distributed: memory_budget={budget} needs remat: auto, which chooses what to recompute within it, or "
            f"schedule: auto, which searches within it; got remat={remat or 'none'} and schedule={wanted.schedule}"
        )
    search_budget = budget if remat != "auto" else None
    if search_budget is not None and wanted.engine != "graph":
        raise ConfigError(
            f"distributed: memory_budget={budget} with schedule auto counts the bytes of captured stages, so it needs "
            f"engine: graph; got {wanted.engine}"
        )
    try:
        kept_within = budget if remat == "auto" else None
        options = EngineOptions(wanted.engine, wanted.compile, remat, kept_within, wanted.overlap_f_b)
    except AutofuncError as error:
        raise ConfigError(f"distributed: {error}") from error
    if options.compiles:
        try:
            require_compiler()
        except AutofuncError as error:
            raise ConfigError(f"distributed.compile: {error}") from error
    return options, search_budget


def _check_recording(config: FinetuneConfig, axes: Axes) -> None:
    """Refuse to record steps on a device or mesh that does not support it."""
    try:
        check_recording("cuda" if on_gpus(config.distributed.device) else "cpu", "the run is")
        check_axes(axes.dp_shard * axes.cp > 1 or config.distributed.offload_policy is not None, axes.tp > 1)
    except AutofuncError as error:
        raise ConfigError(f"distributed.compile: {error}") from error
