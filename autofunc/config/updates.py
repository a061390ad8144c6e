"""The sections `optimizer` and `lr_scheduler`, whose kind depends on the keys in them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, PlainSerializer, Tag

from autofunc.config.environment import read_environment
from autofunc.config.kinds import OneOrMore, Rate, Section, Steps, Target, Text, check_target
from autofunc.config.problems import HAS_KEYS, HAS_TARGET, IS_LIST

OPTIMIZER_KEYS = ("params", "param_groups", "decay", "whole")
"""Keys of an `optimizer` section that are not arguments of its target."""


class ParamGroup(Section):
    """Options of some parameters that differ from the rest; other keys are options of the optimizer."""

    model_config = ConfigDict(extra="allow")

    pattern: Text = Field(description="glob of parameter paths, such as '*.bias'; the first group that matches applies")
    lr_mult: Rate | None = Field(None, description="factor of the learning rate")
    wd_mult: Rate | None = Field(None, description="factor of the weight decay")


class OptimizerSection(Section):
    """An optimizer; other keys are its options."""

    model_config = ConfigDict(extra="allow")

    target: Text = Field(alias="_target_", description="a torch.optim class")
    params: OneOrMore | None = Field(
        None, description="in a list of optimizers: patterns of the parameters it updates; by default all that are left"
    )
    param_groups: list[ParamGroup] = Field([], description="options that differ for some parameters")
    decay: Literal["all", "matrices"] = Field(
        "all", description="matrices: decay only the weights of parameters with two or more dims, so no biases and norms"
    )
    whole: bool | None = Field(
        None, description="pass sharded tensors whole; by default only to those torch optimizers that need them whole"
    )

    @classmethod
    def read(cls, node: dict[str, Any]) -> dict[str, Any]:
        """Return a node with these keys checked."""
        checked = cls.model_validate(check_target(node))
        own = checked.model_dump(include=set(OPTIMIZER_KEYS), exclude_unset=True)
        return {**node, **{name: read_environment(value) for name, value in own.items()}}


class _LikeSection:
    """Gives a mapping the keys of an `OptimizerSection`, for the JSON schema and for messages."""

    section = OptimizerSection

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> Any:
        return handler(OptimizerSection.__pydantic_core_schema__)


AnOptimizer = Annotated[
    dict[str, Any], AfterValidator(OptimizerSection.read), PlainSerializer(read_environment), _LikeSection()
]

Optimizers = Annotated[
    Annotated[AnOptimizer, Tag(HAS_TARGET)] | Annotated[list[AnOptimizer], Field(min_length=1), Tag(IS_LIST)],
    Discriminator(lambda given: IS_LIST if isinstance(given, list) else HAS_TARGET),
]


class LrDecay(Section):
    """The learning rate by step: a warm-up, then a decay."""

    lr_decay_style: Literal["cosine", "linear", "constant", "inverse-square-root", "WSD"] = Field(
        "cosine", description="how it decays after the warm-up; WSD (warm-up, stable, decay): in the last wsd_decay_steps"
    )
    lr_warmup_steps: Annotated[int, Field(ge=0, le=10**12)] | None = Field(
        None, description="steps of the linear warm-up; by default a tenth of lr_decay_steps, at most 1,000"
    )
    lr_decay_steps: Steps | None = Field(
        None, description="steps, including the warm-up, after which it stays at min_lr; by default the whole run"
    )
    init_lr: Rate | None = Field(None, description="start of the warm-up; by default a tenth of optimizer.lr")
    min_lr: Rate | None = Field(None, description="end of the decay; by default a hundredth of optimizer.lr")
    max_lr: Rate | None = Field(None, description="end of the warm-up; by default optimizer.lr")
    wsd_decay_steps: Steps | None = Field(None, description="steps of WSD's decay; by default a tenth of lr_decay_steps")
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = Field(
        "exponential", description="shape of WSD's decay"
    )


class Ema(Section):
    """An exponential moving average of the trained parameters."""

    decay: float = Field(0.999, ge=0, le=1, description="weight of the old average when a step is added")
    every_steps: Steps = Field(1, description="update the average every this many steps")
    validation: bool = Field(False, description="validate the average instead of the last step's parameters")


def _kind_of_section(given: Any) -> str:
    return HAS_TARGET if isinstance(given, dict) and "_target_" in given else HAS_KEYS


LrScheduler = Annotated[
    Annotated[Target, Tag(HAS_TARGET)] | Annotated[LrDecay, Tag(HAS_KEYS)], Discriminator(_kind_of_section)
]
