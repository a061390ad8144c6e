"""The sections `optimizer` and `lr_scheduler`: each is of one kind or another, by what is in it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, PlainSerializer, Tag

from autofunc.config.environment import read_environment
from autofunc.config.kinds import OneOrMore, Rate, Section, Steps, Target, Text, check_target
from autofunc.config.problems import HAS_KEYS, HAS_TARGET, IS_LIST

OPTIMIZER_KEYS = ("params", "param_groups", "decay", "whole")
"""Of a section of `optimizer`: what is no argument of its target."""


class ParamGroup(Section):
    """What some parameters have otherwise; keys beside these are options of the optimizer."""

    model_config = ConfigDict(extra="allow")

    pattern: Text = Field(description="of parameter paths, such as '*.bias'; a parameter is in the first group it matches")
    lr_mult: Rate | None = Field(None, description="factor of the learning rate")
    wd_mult: Rate | None = Field(None, description="factor of the weight decay")


class OptimizerSection(Section):
    """An optimizer; keys beside these are its options."""

    model_config = ConfigDict(extra="allow")

    target: Text = Field(alias="_target_", description="a torch.optim class")
    params: OneOrMore | None = Field(
        None, description="of one of several: patterns of the parameters it takes; by default all that the others leave"
    )
    param_groups: list[ParamGroup] = Field([], description="options that some parameters have otherwise")
    decay: Literal["all", "matrices"] = Field(
        "all", description="matrices: weight decay of parameters with two dims or more alone, so of no bias and no norm"
    )
    whole: bool | None = Field(
        None, description="give it whole tensors where they are sharded; by default to those of torch that need them"
    )

    @classmethod
    def read(cls, node: dict[str, Any]) -> dict[str, Any]:
        """A node with these keys checked."""
        checked = cls.model_validate(check_target(node))
        own = checked.model_dump(include=set(OPTIMIZER_KEYS), exclude_unset=True)
        return {**node, **{name: read_environment(value) for name, value in own.items()}}


class _LikeSection:
    """Of a mapping: it has the keys of an `OptimizerSection`, for the schema and for messages."""

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
        "cosine", description="how it falls after the warm-up; WSD (warm-up, stable, decay): in the last wsd_decay_steps"
    )
    lr_warmup_steps: Annotated[int, Field(ge=0, le=10**12)] | None = Field(
        None, description="steps in which it rises in a straight line; by default a tenth of lr_decay_steps, at most 1,000"
    )
    lr_decay_steps: Steps | None = Field(
        None, description="steps, the warm-up included, after which it stays at min_lr; by default all of the run"
    )
    init_lr: Rate | None = Field(None, description="where the warm-up begins; by default a tenth of optimizer.lr")
    min_lr: Rate | None = Field(None, description="where the decay ends; by default a hundredth of optimizer.lr")
    max_lr: Rate | None = Field(None, description="where the warm-up ends; by default optimizer.lr")
    wsd_decay_steps: Steps | None = Field(None, description="of WSD; by default a tenth of lr_decay_steps")
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = Field(
        "exponential", description="of WSD: how it falls"
    )


class Ema(Section):
    """An exponential moving average of the parameters that are trained."""

    decay: float = Field(0.999, ge=0, le=1, description="how much of the average stays when a step is added")
    every_steps: Steps = Field(1, description="add every so many steps")
    validation: bool = Field(False, description="validate the average, not the parameters of the last step")


def _kind_of_section(given: Any) -> str:
    return HAS_TARGET if isinstance(given, dict) and "_target_" in given else HAS_KEYS


LrScheduler = Annotated[
    Annotated[Target, Tag(HAS_TARGET)] | Annotated[LrDecay, Tag(HAS_KEYS)], Discriminator(_kind_of_section)
]
