"""What a configuration may say: every key, its type, its default and its limits. Unknown keys are errors at every level."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator

from autofunc.config.dataloaders import Dataloader, ValidationDataloader
from autofunc.config.kinds import (
    Bytes,
    Dtype,
    MicrobatchRows,
    OneOrMore,
    Ranks,
    Rows,
    Section,
    Steps,
    Target,
    Text,
    Threads,
)  # fmt: skip
from autofunc.config.problems import all_at_once, in_words, unknown_key
from autofunc.config.tracking import Mlflow, Tensorboard, Wandb
from autofunc.config.updates import Ema, LrScheduler, Optimizers
from autofunc.config.validations import SECTION, is_validation, leading, measured_as
from autofunc.errors import ConfigError, one_of


class StepScheduler(Section):
    """How many rows a step has, and how many steps there are."""

    global_batch_size: Rows = Field(32, description="rows of one optimizer step, over all microbatches")
    local_batch_size: MicrobatchRows = Field(1, description="rows of one microbatch")
    num_epochs: Steps | None = Field(
        None, description="passes over the dataset; by default one, or as many as max_steps takes"
    )
    max_steps: Steps | None = Field(None, description="stop after this many steps, even inside an epoch")
    val_every_steps: Steps | None = Field(None, description="also validate every so many steps, not only at the end")
    ckpt_every_steps: Steps | None = Field(
        None, description="also write a checkpoint every so many steps; needs the section checkpoint"
    )
    save_checkpoint_every_epoch: bool = Field(
        True, description="write a checkpoint at the end of each epoch, where there are any"
    )
    log_remote_every_steps: Steps = Field(1, description="tell tensorboard, wandb and mlflow every so many steps")
    gc_every_steps: Steps | None = Field(
        None, description="look for Python's garbage every so many steps, and at no other time; by default Python decides"
    )


class MixedPrecision(Section):
    """In what precision parameters are gathered and computed with, and gradients travel."""

    param_dtype: Dtype | None = Field(None, description="of parameters as layers see them, and so of activations")
    reduce_dtype: Dtype | None = Field(None, description="in which gradients are summed over ranks; fp32 by default")
    output_dtype: Dtype | None = Field(None, description="of the model's outputs as the loss sees them")
    cast_forward_inputs: bool = Field(True, description="cast floating-point entries of the batch for the layers too")


class TransferSection(Section):
    """How values travel between pipeline ranks, and share a GPU with what it computes."""

    max_ctas: Annotated[int, Field(ge=1, le=64)] | None = Field(
        None, description="blocks of a GPU that a transfer may use at most; by default NCCL decides"
    )
    high_priority: bool = Field(False, description="run transfers on streams of high priority")
    sends_block: bool = Field(
        False, description="post receives such that steps end even where a send waits until its receive is posted"
    )


class Distributed(Section):
    """How the model is spread over processes."""

    strategy: Literal["fsdp2", "ddp"] = Field(
        "fsdp2", description="fsdp2: data parallel ranks share the parameters; ddp: each holds all"
    )
    pp_size: Ranks = Field(1, description="pipeline ranks")
    dp_size: Ranks | None = Field(
        None, description="data parallel ranks; by default as many as the processes that were asked for leave, or 1"
    )
    dp_replicate_size: Ranks | None = Field(
        None, description="groups of data parallel ranks that each share a whole set of parameters (HSDP); divides dp_size"
    )
    tp_size: Ranks = Field(1, description="tensor parallel ranks: they compute each layer together")
    cp_size: Ranks = Field(1, description="context parallel ranks: they share the tokens of each row")
    cp_method: Literal["allgather", "ring"] = Field(
        "allgather", description="how attention comes by the keys and values of other context parallel ranks: all at once, "
        "or in turn while it computes",
    )  # fmt: skip
    ep_size: Ranks = Field(
        1, description="expert parallel ranks: of the data parallel ranks that share parameters, so many have other experts"
    )
    sequence_parallel: bool = Field(False, description="keep the stream between blocks cut over the tp ranks too")
    tp_plan: dict[str, str] | Text | None = Field(
        None, description="pattern of parameter paths -> shard(d) or replicate, or where to import such a table from; "
        "auto, and by default: the model's own, or what its graph gives; own and derived insist on one of the two",
    )  # fmt: skip
    reshard_after_forward: bool = Field(
        False, description="gather a stage's parameters for each of its computations, not once a step"
    )
    prefetch: Annotated[int, Field(ge=0, le=1 << 16)] = Field(
        1, description="computations ahead of its use that a gather starts"
    )
    mp_policy: MixedPrecision = MixedPrecision()
    transfers: TransferSection = TransferSection()
    offload_policy: Literal["cpu"] | None = Field(None, description="where sharded parameters wait: cpu, or the device")
    split_points: list[Text] | Ranks | Literal["auto"] | None = Field(
        None, description="names or globs of the layers at which a new stage begins, or a number of stages, balanced by "
        "what layers cost; auto, and by default: as many as the schedule has",
    )  # fmt: skip
    schedule: Text = Field(
        "1f1b",
        description="a named pipeline schedule, a table in a .csv or .json file, or a function: path/to/file.py:name; "
        "auto searches for one with costs measured at the start of the run",
    )  # fmt: skip
    engine: Literal["graph", "eager"] = Field(
        "graph", description="how stages are differentiated: captured once, or by autograd"
    )
    compile: bool | Literal["graphs", "inductor+graphs"] = Field(
        False, description="run the captured stages as compiled code; graphs: record steps as CUDA graphs; or both"
    )
    remat: Literal["layer", "stage", "auto"] | None = Field(
        None, description="what the backward computes again instead of keeping it"
    )
    memory_budget: Bytes | None = Field(
        None, description="bytes of a rank that remat auto, or else schedule auto, keeps within"
    )
    overlap_f_b: bool = Field(
        True, description="run the pairs that dualpipe_v marks side by side, where stages exchange values (ep, tp)"
    )
    device: Literal["cpu", "cuda"] | None = Field(
        None, description="what each process computes on; by default a GPU of its own, if this machine has any"
    )
    threads_per_rank: Threads = Field(1, description="CPU threads of each process")
    timeout_minutes: float = Field(10.0, gt=0, le=525_600, description="a rank that waits longer for another ends the run")
    step_timeout_seconds: float | None = Field(
        None, gt=0, le=31_536_000, description="how long a rank may stay at one action before the run ends and says which "
        "rank is late and what it does; by default 20 times the slowest step so far, at least 60 s",
    )  # fmt: skip


class CheckpointSection(Section):
    """What is kept of a run while it goes, so that it can go on after it was interrupted."""

    enabled: bool = Field(True, description="write checkpoints: every ckpt_every_steps, after each epoch and at the end")
    checkpoint_dir: Text | None = Field(None, description="where; by default checkpoints in output_dir")
    is_async: bool = Field(False, description="write while training goes on; takes the memory of a copy on the host")
    max_recent_checkpoints: Steps | None = Field(
        None, description="how many of the newest are kept, beside the one with the lowest validation loss; by default all"
    )
    save_consolidated: Literal["final", "every"] | bool = Field(
        "final", description="whole weights as model.safetensors: final at the end of a run, every (or true) in each "
        "checkpoint as well, false never",
    )  # fmt: skip
    best_metric_key: Text | None = Field(
        None, description="name of the validation dataset whose loss LOWEST_VAL and early_stopping look at: default is the "
        "one without a name; left out, that one or, where all have names, the first",
    )  # fmt: skip
    restore_from: Text | None = Field(
        None, description="a checkpoint to go on from: its folder; LATEST or LOWEST_VAL of checkpoint_dir; AUTO, the "
        "latest if there is one",
    )  # fmt: skip


class EarlyStopping(Section):
    """When a run ends before its last step."""

    patience: Steps = Field(3, description="how many validations in a row may be no better than the best one before them")
    min_delta: float = Field(0.0, ge=0, description="by how much a loss must be lower to be better")


class ClipGradNorm(Section):
    """Clipping of gradients."""

    max_norm: float = Field(1.0, gt=0, description="the global norm that gradients are scaled down to")


class Peft(Section):
    """Low-rank adapters (LoRA) in the place of training the weights themselves."""

    target_modules: OneOrMore | None = Field(
        None, description="names or patterns of the weights that get adapters, such as q_proj or *.mlp.*"
    )
    match_all_linear: bool = Field(
        False, description="whatever the model multiplies by, but for its output layer, in the place of target_modules"
    )
    exclude_modules: OneOrMore | None = Field(
        None, description="names or patterns of those that get none; alone, all others that the model multiplies by do"
    )
    modules_to_save: OneOrMore | None = Field(None, description="names or patterns of parts that are trained whole")
    dim: Annotated[int, Field(ge=1, le=1 << 16)] = Field(8, description="rank of the adapters")
    alpha: float = Field(32.0, gt=0, description="an adapter is multiplied by alpha / dim")
    dropout: float = Field(0.0, ge=0, lt=1, description="of what an adapter multiplies")
    use_rslora: bool = Field(False, description="divide alpha by the root of dim")


def _with_named(schema: dict[str, Any]) -> None:
    """Say in the JSON schema which other keys there may be."""
    schema["patternProperties"] = {f"^{SECTION}_[A-Za-z0-9]": schema["properties"][SECTION]}
    schema["additionalProperties"] = False


class FinetuneConfig(Section):
    """The whole file. Beside these keys it takes validation datasets by name: `validation_dataset_NAME`."""

    model_config = ConfigDict(extra="allow", json_schema_extra=_with_named)  # `parse_config` refuses all others
    __pydantic_extra__: dict[str, Target | None] = Field(init=False)

    model: Target = Field(description="a callable that returns an nn.Module or an af.Model")
    inputs: OneOrMore | Annotated[dict[str, Text], Field(min_length=1)] | None = Field(
        None, description="entries of a batch that a module's forward gets, in the order of its arguments, or argument -> "
        "entry; by default those that it names",
    )  # fmt: skip
    trainable: OneOrMore | None = Field(
        None,
        description="patterns of the parameters that are trained, such as lm_head*; by default all that are not frozen",
    )
    peft: Peft | None = Field(None, description="train low-rank adapters, and nothing else")
    weights: Text | None = Field(
        None,
        description="own: those a module is made with (default); seed: made from the seed, each rank its stages' only; "
        "or a folder or file of safetensors, of which each rank reads its part",
    )
    modeling_paths: list[Text] = Field(
        [], description="modules, packages or files whose model classes autofunc.AutoModel is to find"
    )
    dataset: Target = Field(description="what is learnt from")
    validation_dataset: Target | None = Field(None, description="what the validation loss is measured on")
    validation_dataloader: ValidationDataloader = ValidationDataloader()
    metrics: dict[str, Target] = Field(
        {}, description="what else is measured in validation, by name: functions of (outputs, microbatch) that return a "
        "mean, or (sum, weight), such as autofunc.metrics.accuracy",
    )  # fmt: skip
    early_stopping: EarlyStopping | None = Field(None, description="end when the validation loss gets no better")
    dataloader: Dataloader = Dataloader()
    step_scheduler: StepScheduler = StepScheduler()
    distributed: Distributed = Distributed()
    optimizer: Optimizers = Field(description="a torch.optim class and its options, or a list of them")
    lr_scheduler: LrScheduler | None = Field(
        None, description="the learning rate by step: a warm-up and a decay, or a scheduler of torch.optim.lr_scheduler; "
        "by default it is constant",
    )  # fmt: skip
    ema: Ema | None = Field(None, description="keep a moving average of the parameters that are trained")
    loss_fn: Target | None = Field(None, description="loss(outputs, microbatch); by default autofunc.losses.causal_lm")
    checkpoint: CheckpointSection | None = Field(
        None, description="checkpoints of the run; without the section there are none"
    )
    clip_grad_norm: ClipGradNorm | None = Field(None, description="scale gradients down to a global norm")
    nonfinite: Literal["stop", "skip", "warn"] = Field(
        "stop", description="what becomes of a step whose loss or gradients are not finite: stop ends the run, skip leaves "
        "all as it was before the step, warn takes it",
    )  # fmt: skip
    max_skips: Steps = Field(10, description="of nonfinite skip: how many steps in a row, before the run ends")
    peak_tflops: float | None = Field(
        None, gt=0, le=1e9, description="what each device is capable of, in 1e12 operations a second, to show the model "
        "FLOPs utilization; that of A100, H100 and H200 in bf16 is known",
    )  # fmt: skip
    tensorboard: Tensorboard | None = Field(None, description="files for TensorBoard too")
    wandb: Wandb | None = Field(None, description="follow the run in Weights & Biases too")
    mlflow: Mlflow | None = Field(None, description="follow the run in MLflow too")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(42, description="of weights, data order and dropout")
    output_dir: Text | None = Field(None, description="where results go; by default runs/<name of the file>")
    export: Text | None = Field(
        None,
        description="folder in output_dir that a run leaves at its end, and that transformers' from_pretrained loads",
    )

    @property
    def validations(self) -> dict[str, dict[str, Any]]:
        """The sections of validation datasets by their names, in order: the one without a name first."""
        sections = {SECTION: self.validation_dataset, **(self.model_extra or {})}
        return {name: section for name, section in sections.items() if section is not None}

    @property
    def leading_validation(self) -> str | None:
        """The section of the validation dataset whose loss LOWEST_VAL and early stopping look at; None without any."""
        return leading(self.validations, self.checkpoint.best_metric_key if self.checkpoint is not None else None)

    @model_validator(mode="after")
    def _measures_what_is_asked_for(self) -> FinetuneConfig:
        for name in ("metrics", "early_stopping"):
            if getattr(self, name) and not self.validations:
                raise ValueError(f"{name} is measured on validation_dataset, and there is none")
        try:
            _ = self.leading_validation
        except ConfigError as error:
            raise ValueError(f"checkpoint.best_metric_key: {error}") from error
        known: dict[str, str] = {}
        for section in self.validations:
            for what in ("loss", *self.metrics):
                name = measured_as(section, what)
                if name in known:
                    raise ValueError(f"{name} would be measured on {known[name]} and on {section}; give one another name")
                known[name] = section
        return self

    @model_validator(mode="after")
    def _writes_what_is_asked_for(self) -> FinetuneConfig:
        if self.step_scheduler.ckpt_every_steps is not None and self.checkpoint is None:
            raise ValueError(
                "step_scheduler.ckpt_every_steps needs a section checkpoint, which may be empty: checkpoint: {}"
            )
        return self


def parse_config(raw: Mapping[str, Any]) -> FinetuneConfig:
    """Check a configuration.

    Raises:
        ConfigError: listing every problem: the key, what was given, what was expected, and the nearest known key.
    """
    fields = FinetuneConfig.model_fields
    known = {name: value for name, value in raw.items() if name in fields or is_validation(name)}
    unknown = [name for name in raw if name not in known]
    problems = [line for name in unknown for line in unknown_key([name], raw[name], one_of(name, fields))]
    try:
        config = FinetuneConfig.model_validate(known)
    except ValidationError as error:
        problems += in_words(error, FinetuneConfig)
    if not problems:
        return config
    raise ConfigError(all_at_once(problems))
