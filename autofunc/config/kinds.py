"""Types of configuration keys: numbers with limits, targets, and the base class of sections."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

from autofunc.config.environment import FromEnvironment, read_environment
from autofunc.config.units import parse_bytes

Rows = Annotated[int, Field(ge=1, le=1 << 24)]

MicrobatchRows = Annotated[int, Field(ge=1, le=1 << 16)]

RowLength = Annotated[int, Field(ge=1, le=1 << 24)]

Steps = Annotated[int, Field(ge=1, le=10**12)]

Ranks = Annotated[int, Field(ge=1, le=1 << 16)]

Threads = Annotated[int, Field(ge=1, le=1 << 10)]

Rate = Annotated[float, Field(ge=0)]

Text = Annotated[str, Field(min_length=1)]

OneOrMore = Annotated[list[Text], Field(min_length=1)]


def check_target(node: dict[str, Any]) -> dict[str, Any]:
    """Return the section if it names a target; refuse it otherwise."""
    if not isinstance(node.get("_target_"), str) or not node["_target_"]:
        raise ValueError("needs a _target_: a dotted path such as 'torch.optim.AdamW', or 'path/to/file.py:name'")
    return node


_DTYPES = {"float32": "float32", "fp32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16"}


def _dtype_name(given: object) -> object:
    """Normalise a dtype's name: `bf16`, `bfloat16` and `torch.bfloat16` are the same."""
    name = given.removeprefix("torch.") if isinstance(given, str) else given
    if name is None:
        return None
    if isinstance(name, str) and name in _DTYPES:
        return _DTYPES[name]
    reason = "; float16 would need loss scaling, which is not supported" if name in ("float16", "fp16", "half") else ""
    raise ValueError(f"expected bfloat16 or float32{reason}")


Dtype = Annotated[Literal["float32", "bfloat16"], BeforeValidator(_dtype_name)]

Bytes = Annotated[int, BeforeValidator(parse_bytes)]

Target = Annotated[dict[str, Any], AfterValidator(check_target), PlainSerializer(read_environment)]
"""A section that names a callable in `_target_`; its other keys are the callable's arguments."""


class Section(BaseModel):
    """Base class of all sections: frozen, strict, without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _read(cls, given: Any) -> Any:
        """Drop sections left empty, and convert environment variables to the types their keys take."""
        if not isinstance(given, dict):
            return given
        kinds = {name: field.annotation for name, field in cls.model_fields.items()}
        sections = {name for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Section)}
        return {
            name: value.read(kinds.get(name)) if isinstance(value, FromEnvironment) else value
            for name, value in given.items()
            if value is not None or name not in sections
        }
