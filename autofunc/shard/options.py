"""How a pipeline shares its parameters and work over the axes of a mesh: the choices of `af.pipeline`, checked together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy

from autofunc.context_parallel.attention import check_method
from autofunc.errors import AutofuncError, one_of
from autofunc.model import TensorParallel
from autofunc.splitting import Precision
from autofunc.spreading import SOURCES


@dataclass(frozen=True)
class Sharding:
    """Checked when made.

    Args:
        reshard_after_forward: gather the parameters of a stage for each of its computations, and let them go after it:
            less memory, one gather a use. By default they are gathered once a step.
        prefetch: how many computations ahead of the first use gathering starts.
        mp_policy: in what precision parameters are gathered and computed with (`param_dtype`), gradients are reduced
            (`reduce_dtype`; fp32 by default) and the last outputs are given to the loss (`output_dtype`). Applies without a
            mesh too. Sums over microbatches are fp32 at least.
        offload_policy: where the sharded parameters wait, see `torch.distributed.fsdp.CPUOffloadPolicy`.
        tensor_parallel: how parameters are cut over the tp axis: a table; by default ("auto") the model's own, and of a
            captured module without one ("own" insists on it) what its graph gives ("derived").
        expert_parallel: over how many ranks routed experts are spread: neighbours among the `dp_shard` ranks of the mesh,
            which still have other rows each, and hold E / expert_parallel of E experts.
        sequence_parallel: keep the stream between blocks cut along the tokens over the tp axis: less memory, the same
            traffic.
        context_parallel: how attention of tokens that are cut over the cp axis comes by keys and values: "allgather", all
            at once, or "ring", from one rank after the other while it computes.

    Raises:
        AutofuncError: for choices that do not exist or go together.
    """

    reshard_after_forward: bool = False
    prefetch: int = 1
    mp_policy: MixedPrecisionPolicy = field(default_factory=MixedPrecisionPolicy)
    offload_policy: OffloadPolicy = field(default_factory=OffloadPolicy)
    tensor_parallel: TensorParallel | Mapping[str, str] | str | None = None
    sequence_parallel: bool = False
    context_parallel: str = "allgather"
    expert_parallel: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.tensor_parallel, str) and self.tensor_parallel not in SOURCES:
            raise AutofuncError(
                f"sharding: tensor_parallel={self.tensor_parallel!r}; {one_of(self.tensor_parallel, SOURCES)}"
            )
        if self.prefetch < 0:
            raise AutofuncError(f"sharding: prefetch={self.prefetch}, expected 0 or more")
        check_method(self.context_parallel)
        if self.expert_parallel < 1:
            raise AutofuncError(f"sharding: expert_parallel={self.expert_parallel}, expected 1 or more")
        for name in ("param_dtype", "reduce_dtype", "output_dtype"):
            dtype = getattr(self.mp_policy, name)
            if dtype is torch.float16:
                raise AutofuncError(
                    f"sharding: mp_policy.{name} is float16, in whose range gradients do not fit without loss scaling, "
                    "which is not supported; use bfloat16"
                )
            if dtype is not None and not dtype.is_floating_point:
                raise AutofuncError(f"sharding: mp_policy.{name} is {dtype}; expected a floating-point type")

    @property
    def precision(self) -> Precision:
        """What stages compute in."""
        policy = self.mp_policy
        return Precision(policy.param_dtype, policy.output_dtype, policy.cast_forward_inputs)

    def table(self, own: TensorParallel | None) -> TensorParallel | None:
        """The placement table for a model that brings this one. What must divide stays the model's to say."""
        given = self.tensor_parallel
        if isinstance(given, TensorParallel):
            return given
        if given is None or isinstance(given, str):
            return own
        return TensorParallel(given, own.divisible if own is not None else {})
