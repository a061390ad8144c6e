"""How a pipeline shares parameters and work over the axes of a mesh: the sharding options of `af.pipeline`."""

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
    """How parameters and work are shared over the axes of a mesh; checked on construction.

    Args:
        reshard_after_forward: gather a stage's parameters for each of its computations, and free them after it:
            less memory, one gather per use. By default they are gathered once per step.
        prefetch: how many computations before its first use a stage's gather starts.
        mp_policy: precision in which parameters are gathered and used (`param_dtype`), gradients are reduced
            (`reduce_dtype`; fp32 by default) and the last outputs reach the loss (`output_dtype`). Applies without a
            mesh too. Sums over microbatches are at least fp32.
        offload_policy: where sharded parameters are kept, see `torch.distributed.fsdp.CPUOffloadPolicy`.
        tensor_parallel: how parameters are cut over the tp axis: a table; by default ("auto") the model's own, or for a
            captured module without one, a table derived from its graph. "own" and "derived" insist on one of the two.
        expert_parallel: number of ranks that routed experts are spread over: neighbouring `dp_shard` ranks of the mesh,
            which still have different rows, and hold E / expert_parallel of E experts each.
        sequence_parallel: keep the residual stream between blocks cut along the tokens over the tp axis: less memory, the
            same traffic.
        context_parallel: how attention gets keys and values of tokens cut over the cp axis: "allgather", all
            at once, or "ring", rank by rank while it computes.

    Raises:
        AutofuncError: for unknown or conflicting choices.
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
                    f"sharding: mp_policy.{name} is float16, whose range is too small for gradients without loss scaling, "
                    "which is not supported; use bfloat16"
                )
            if dtype is not None and not dtype.is_floating_point:
                raise AutofuncError(f"sharding: mp_policy.{name} is {dtype}; expected a floating-point type")

    @property
    def precision(self) -> Precision:
        """The precision that stages compute in."""
        policy = self.mp_policy
        return Precision(policy.param_dtype, policy.output_dtype, policy.cast_forward_inputs)

    def table(self, own: TensorParallel | None) -> TensorParallel | None:
        """Return the placement table for a model whose own one is given. The model still decides what must divide."""
        given = self.tensor_parallel
        if isinstance(given, TensorParallel):
            return given
        if given is None or isinstance(given, str):
            return own
        return TensorParallel(given, own.divisible if own is not None else {})
