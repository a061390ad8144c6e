"""The schema of a configuration: every key, its type, default and limits. Unknown keys are errors at every level."""

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
    """How many rows a step takes, and how many steps run."""

    global_batch_size: Rows = Field(32, description="rows per optimizer step, over all microbatches")
    local_batch_size: MicrobatchRows = Field(1, description="rows per microbatch")
    num_epochs: Steps | None = Field(
        None, description="passes over the dataset; by default one, or as many as max_steps needs"
    )
    max_steps: Steps | None = Field(None, description="stop after this many steps, even inside an epoch")
    val_every_steps: Steps | None = Field(None, description="validate every this many steps too, not only at the end")
    ckpt_every_steps: Steps | None = Field(
        None, description="write a checkpoint every this many steps too; needs the section checkpoint"
    )
    save_checkpoint_every_epoch: bool = Field(
        True, description="write a checkpoint at the end of each epoch, if there is a section checkpoint"
    )
    log_remote_every_steps: Steps = Field(1, description="log to tensorboard, wandb and mlflow every this many steps")
    gc_every_steps: Steps | None = Field(
        None, description="run Python's garbage collector every this many steps only; by default Python decides when"
    )


class MixedPrecision(Section):
    """The precision of parameters, activations and gradients."""

    param_dtype: Dtype | None = Field(None, description="dtype of parameters as layers see them, and so of activations")
    reduce_dtype: Dtype | None = Field(None, description="dtype in which gradients are summed over ranks; fp32 by default")
    output_dtype: Dtype | None = Field(None, description="dtype of the model's outputs as the loss sees them")
    cast_forward_inputs: bool = Field(True, description="cast the batch's floating-point entries to param_dtype too")


class TransferSection(Section):
    """Transfers between pipeline ranks, and their share of a GPU."""

    max_ctas: Annotated[int, Field(ge=1, le=64)] | None = Field(
        None, description="most thread blocks of a GPU that a transfer may use; by default NCCL decides"
    )
    high_priority: bool = Field(False, description="run transfers on high-priority streams")
    sends_block: bool = Field(
        False, description="order receives so that steps finish even if a send blocks until its receive is posted"
    )
    sockets: bool = Field(
        True, description="on CPU, send small messages between ranks of one machine over Unix sockets, not gloo"
    )


class Distributed(Section):
    """How the model is distributed over processes."""

    strategy: Literal["fsdp2", "ddp"] = Field(
        "fsdp2", description="fsdp2: data parallel ranks shard the parameters; ddp: each holds all of them"
    )
    pp_size: Ranks = Field(1, description="pipeline ranks")
    dp_size: Ranks | None = Field(
        None, description="data parallel ranks; by default as many as the requested processes allow, or 1"
    )
    dp_replicate_size: Ranks | None = Field(
        None, description="groups of data parallel ranks that each hold a whole set of parameters (HSDP); divides dp_size"
    )
    tp_size: Ranks = Field(1, description="tensor parallel ranks, which compute each layer together")
    cp_size: Ranks = Field(1, description="context parallel ranks, which share the tokens of each row")
    cp_method: Literal["allgather", "ring"] = Field(
        "allgather", description="how attention gets the keys and values of other context parallel ranks: all at once, "
        "or one rank's after the other while it computes",
    )  # fmt: skip
    ep_size: Ranks = Field(
        1,
        description="expert parallel ranks: how many of the ranks that shard parameters (along dp and cp) hold different "
        "experts",
    )
    sequence_parallel: bool = Field(False, description="shard activations between blocks over the tp ranks too")
    tp_plan: dict[str, str] | Text | None = Field(
        None, description="pattern of parameter paths -> shard(d) or replicate, or where to import such a table from; "
        "auto (default): the model's own table, else one derived from its graph; own and derived require that source",
    )  # fmt: skip
    reshard_after_forward: bool = Field(
        False, description="gather a stage's parameters for each of its computations instead of once a step"
    )
    prefetch: Annotated[int, Field(ge=0, le=1 << 16)] = Field(
        1, description="how many computations ahead of its use a gather starts"
    )
    mp_policy: MixedPrecision = MixedPrecision()
    transfers: TransferSection = TransferSection()
    offload_policy: Literal["cpu"] | None = Field(
        None, description="where sharded parameters are kept between uses: cpu, or by default the device"
    )
    split_points: list[Text] | Ranks | Literal["auto"] | None = Field(
        None, description="names or globs of the layers at which a new stage begins, or a number of stages, balanced by "
        "the cost of layers; auto (default): as many stages as the schedule has",
    )  # fmt: skip
    schedule: Text = Field(
        "1f1b",
        description="a named pipeline schedule, a table in a .csv or .json file, or a function: path/to/file.py:name; "
        "auto searches for one with costs measured at the start of the run",
    )  # fmt: skip
    engine: Literal["graph", "eager"] = Field(
        "graph", description="how stages are differentiated: captured once as graphs, or by autograd"
    )
    compile: bool | Literal["graphs", "inductor+graphs"] = Field(
        False, description="compile the captured stages; graphs: record steps as CUDA graphs; inductor+graphs: both"
    )
    remat: Literal["layer", "stage", "auto"] | None = Field(
        None, description="what the backward recomputes instead of keeping it"
    )
    memory_budget: Bytes | None = Field(None, description="bytes per rank that remat auto, or schedule auto, stays within")
    overlap_f_b: bool = Field(
        True, description="overlap the pairs that dualpipe_v marks, if stages exchange values (ep, tp)"
    )
    device: Literal["cpu", "cuda"] | None = Field(
        None, description="the device each process computes on; by default its own GPU if this machine has any"
    )
    threads_per_rank: Threads = Field(1, description="CPU threads of each process")
    timeout_minutes: float = Field(10.0, gt=0, le=525_600, description="the run ends if a rank waits longer for another")
    step_timeout_seconds: float | None = Field(
        None, gt=0, le=31_536_000, description="how long a rank may stay at one action before the run ends, naming the "
        "late rank and its action; by default 20 times the slowest step so far, at least 60 s",
    )  # fmt: skip


class CheckpointSection(Section):
    """What a run saves so that it can be resumed."""

    enabled: bool = Field(True, description="write checkpoints: every ckpt_every_steps, after each epoch and at the end")
    checkpoint_dir: Text | None = Field(None, description="where; by default checkpoints in output_dir")
    is_async: bool = Field(False, description="write while training continues; takes host memory for one copy")
    max_recent_checkpoints: Steps | None = Field(
        None, description="how many of the newest to keep, besides the one with the lowest validation loss; by default all"
    )
    save_consolidated: Literal["final", "every"] | bool = Field(
        "final", description="save whole weights as model.safetensors: final at the end of a run, every (or true) in each "
        "checkpoint as well, false never",
    )  # fmt: skip
    best_metric_key: Text | None = Field(
        None, description="name of the validation dataset whose loss LOWEST_VAL and early_stopping use; default is the "
        "dataset without a name; by default that one, or the first if all have names",
    )  # fmt: skip
    restore_from: Text | None = Field(
        None, description="a checkpoint to resume from: its folder; LATEST or LOWEST_VAL of checkpoint_dir; AUTO, the "
        "latest if there is one",
    )  # fmt: skip


class EarlyStopping(Section):
    """When a run stops before its last step."""

    patience: Steps = Field(3, description="how many validations in a row may fail to improve on the best one")
    min_delta: float = Field(0.0, ge=0, description="by how much the loss must drop to count as an improvement")


class ClipGradNorm(Section):
    """Gradient clipping."""

    max_norm: float = Field(1.0, gt=0, description="global norm that gradients are scaled down to")


class Peft(Section):
    """Low-rank adapters (LoRA), trained instead of the weights themselves."""

    target_modules: OneOrMore | None = Field(
        None, description="names or patterns of the weights that get adapters, such as q_proj or *.mlp.*"
    )
    match_all_linear: bool = Field(
        False, description="adapt every weight the model multiplies by, except its output layer; replaces target_modules"
    )
    exclude_modules: OneOrMore | None = Field(
        None, description="names or patterns of weights without adapters; given alone, all other weights get them"
    )
    modules_to_save: OneOrMore | None = Field(None, description="names or patterns of modules trained in full")
    dim: Annotated[int, Field(ge=1, le=1 << 16)] = Field(8, description="rank of the adapters")
    alpha: float = Field(32.0, gt=0, description="an adapter's output is multiplied by alpha / dim")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout of an adapter's input")
    use_rslora: bool = Field(False, description="divide alpha by the square root of dim")


def _with_named(schema: dict[str, Any]) -> None:
    """Add the named validation datasets to the JSON schema."""
    schema["patternProperties"] = {f"^{SECTION}_[A-Za-z0-9]": schema["properties"][SECTION]}
    schema["additionalProperties"] = False


class FinetuneConfig(Section):
    """The whole file. Besides these keys it takes named validation datasets: `validation_dataset_NAME`."""

    model_config = ConfigDict(extra="allow", json_schema_extra=_with_named)  # `parse_config` refuses all others
    __pydantic_extra__: dict[str, Target | None] = Field(init=False)

    model: Target = Field(description="a callable that returns an nn.Module or an af.Model")
    inputs: OneOrMore | Annotated[dict[str, Text], Field(min_length=1)] | None = Field(
        None, description="batch entries passed to the module's forward, in the order of its arguments, or argument -> "
        "entry; by default those named like its arguments",
    )  # fmt: skip
    trainable: OneOrMore | None = Field(
        None,
        description="patterns of the parameters to train, such as lm_head*; by default all that are not frozen",
    )
    peft: Peft | None = Field(None, description="train low-rank adapters only")
    weights: Text | None = Field(
        None,
        description="own (default): the weights the module is constructed with; seed: initialised from the seed, each rank "
        "its own stages; or a folder or file of safetensors, of which each rank reads its part",
    )
    modeling_paths: list[Text] = Field(
        [], description="modules, packages or files in which autofunc.AutoModel looks for model classes"
    )
    dataset: Target = Field(description="the training data")
    validation_dataset: Target | None = Field(None, description="the data the validation loss is measured on")
    validation_dataloader: ValidationDataloader = ValidationDataloader()
    metrics: dict[str, Target] = Field(
        {}, description="further measures in validation, by name: functions of (outputs, microbatch) that return a mean, "
        "or (sum, weight), such as autofunc.metrics.accuracy",
    )  # fmt: skip
    early_stopping: EarlyStopping | None = Field(None, description="stop when the validation loss no longer improves")
    dataloader: Dataloader = Dataloader()
    step_scheduler: StepScheduler = StepScheduler()
    distributed: Distributed = Distributed()
    optimizer: Optimizers = Field(description="a torch.optim class and its options, or a list of them")
    lr_scheduler: LrScheduler | None = Field(
        None, description="the learning rate by step: a warm-up and a decay, or a scheduler of torch.optim.lr_scheduler; "
        "constant by default",
    )  # fmt: skip
    ema: Ema | None = Field(None, description="keep a moving average of the trained parameters")
    loss_fn: Target | None = Field(None, description="loss(outputs, microbatch); by default autofunc.losses.causal_lm")
    checkpoint: CheckpointSection | None = Field(
        None, description="checkpoints of the run; none are written without this section"
    )
    clip_grad_norm: ClipGradNorm | None = Field(None, description="scale gradients down to a global norm")
    nonfinite: Literal["stop", "skip", "warn"] = Field(
        "stop", description="what to do if a step's loss or gradients are not finite: stop ends the run, skip discards the "
        "step, warn applies it",
    )  # fmt: skip
    max_skips: Steps = Field(10, description="with nonfinite skip: how many steps in a row before the run ends")
    peak_tflops: float | None = Field(
        None, gt=0, le=1e9, description="peak of each device in 1e12 FLOP/s, needed to show the model FLOPs utilization; "
        "known for A100, H100 and H200 in bf16",
    )  # fmt: skip
    tensorboard: Tensorboard | None = Field(None, description="log to TensorBoard files too")
    wandb: Wandb | None = Field(None, description="log the run to Weights & Biases too")
    mlflow: Mlflow | None = Field(None, description="log the run to MLflow too")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(42, description="seed of weights, data order and dropout")
    output_dir: Text | None = Field(None, description="where results go; by default runs/<name of the file>")
    export: Text | None = Field(
        None,
        description="folder in output_dir, written at the end of the run, that transformers' from_pretrained loads",
    )

    @property
    def validations(self) -> dict[str, dict[str, Any]]:
        """The sections of validation datasets by name, in order: the one without a name first."""
        sections = {SECTION: self.validation_dataset, **(self.model_extra or {})}
        return {name: section for name, section in sections.items() if section is not None}

    @property
    def leading_validation(self) -> str | None:
        """The section of the validation dataset whose loss LOWEST_VAL and early stopping use; None without any."""
        return leading(self.validations, self.checkpoint.best_metric_key if self.checkpoint is not None else None)

    @model_validator(mode="after")
    def _check_validation(self) -> FinetuneConfig:
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
                    raise ValueError(f"{name} would be measured on {known[name]} and on {section}; rename one of them")
                known[name] = section
        return self

    @model_validator(mode="after")
    def _check_checkpoints(self) -> FinetuneConfig:
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
