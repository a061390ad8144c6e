"""How a run spreads over processes: the sizes of the mesh's axes, and the sharding options."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from autofunc.config import FinetuneConfig, call, import_object
from autofunc.context_parallel.axis import imagined_axis
from autofunc.errors import AutofuncError, ConfigError, divisors, one_of
from autofunc.mesh import make_mesh
from autofunc.model import TensorParallel
from autofunc.shard import Sharding
from autofunc.shown import quoted
from autofunc.splitting import Setting
from autofunc.spreading import SOURCES


@dataclass(frozen=True)
class Axes:
    """Sizes of the mesh's axes, as `af.make_mesh` takes them."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1  # ranks over which experts are spread: splits dp_shard x cp

    @property
    def dp(self) -> int:
        """Number of data parallel ranks."""
        return self.dp_replicate * self.dp_shard

    @property
    def num_processes(self) -> int:
        """Number of processes in the run."""
        return self.pp * self.dp * self.cp * self.tp

    def mesh(self, device_type: str) -> DeviceMesh:
        """Make the mesh of this run's processes."""
        return make_mesh(self.pp, self.dp_replicate, self.dp_shard, self.cp, self.tp, device_type=device_type)

    def __str__(self) -> str:
        sizes = {"pp_size": self.pp, "dp_size": self.dp, "cp_size": self.cp, "tp_size": self.tp, "ep_size": self.ep}
        return ", ".join(f"{name}={size}" for name, size in sizes.items() if size > 1) or "pp_size=1"


def axes_of(config: FinetuneConfig, num_processes: int | None) -> Axes:
    """Return the configured axis sizes; an absent `dp_size` is whatever the process count leaves.

    Args:
        config: the configuration.
        num_processes: running or requested processes; None derives it from the configuration.

    Raises:
        ConfigError: if the sizes do not fit each other or the process count.
    """
    wanted = config.distributed
    others = wanted.pp_size * wanted.cp_size * wanted.tp_size
    replicate = wanted.dp_replicate_size
    dp = wanted.dp_size
    if dp is None and num_processes is not None:
        if num_processes % others:
            raise ConfigError(
                f"distributed: {_sizes(wanted)} need {others} processes or a multiple, but there are {num_processes}"
            )
        dp = num_processes // others
    dp = dp or (replicate or 1) * (wanted.ep_size // math.gcd(wanted.ep_size, wanted.cp_size))
    if num_processes is not None and dp * others != num_processes:
        raise ConfigError(
            f"distributed: {_sizes(wanted, dp)} need {dp * others} processes, but there are {num_processes}; start that "
            "many, or leave dp_size out to derive it"
        )
    if replicate is not None and dp % replicate:
        raise ConfigError(
            f"distributed: dp_replicate_size={replicate} does not divide dp_size={dp}; it is the number of groups that "
            "each hold all parameters"
        )
    if wanted.strategy == "ddp":
        if replicate not in (None, dp):
            raise ConfigError(
                f"distributed: dp_replicate_size={replicate} with strategy ddp, under which all {dp} data parallel ranks "
                "hold all parameters; leave it out, or use strategy: fsdp2"
            )
        if wanted.ep_size > 1:
            raise ConfigError(
                f"distributed: ep_size={wanted.ep_size} with strategy ddp, under which each data parallel rank holds all "
                "experts; use strategy: fsdp2"
            )
        return Axes(wanted.pp_size, dp, 1, wanted.cp_size, wanted.tp_size)
    shard = dp // (replicate or 1)
    sharing = shard * wanted.cp_size
    if sharing % wanted.ep_size:
        working = ", ".join(divisors(sharing))
        beside = f", cp_size={wanted.cp_size}" if wanted.cp_size > 1 else ""
        raise ConfigError(
            f"distributed: ep_size={wanted.ep_size} does not divide the {sharing} ranks that share parameters "
            f"(dp_size={dp}, dp_replicate_size={replicate or 1}{beside}), over which experts are spread; one of {working} "
            "does"
        )
    return Axes(wanted.pp_size, replicate or 1, shard, wanted.cp_size, wanted.tp_size, wanted.ep_size)


def _sizes(wanted: Any, dp: int | None = None) -> str:
    """List the sizes, leaving out a cp_size of 1."""
    sizes = {"pp_size": wanted.pp_size, "dp_size": dp, "cp_size": wanted.cp_size if wanted.cp_size > 1 else None}
    listed = ", ".join(f"{name}={size}" for name, size in sizes.items() if size is not None)
    return f"{listed} and tp_size={wanted.tp_size}"


def sharding_of(config: FinetuneConfig, axes: Axes, notes: list[str]) -> Sharding:
    """Return the choices of section `distributed`, as the pipeline takes them.

    Args:
        config: the configuration.
        axes: of the mesh.
        notes: gains a line for each choice without effect.

    Raises:
        ConfigError: if choices conflict.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy

    wanted = config.distributed
    alone = axes.num_processes == 1
    if wanted.offload_policy is not None and (alone or wanted.strategy == "ddp"):
        raise ConfigError(
            "distributed: offload_policy needs strategy: fsdp2 and several processes; got strategy "
            f"{wanted.strategy} and {axes.num_processes} process(es)"
        )
    for name, needs in (("sequence_parallel", "tp_size"), ("reshard_after_forward", "dp_size")):
        if getattr(wanted, name) and (axes.tp if needs == "tp_size" else axes.dp_shard * axes.cp) == 1:
            notes.append(f"{name} has no effect: there is one rank along {needs}")
    policy, table = wanted.mp_policy, _table(wanted.tp_plan)
    try:
        return Sharding(
            reshard_after_forward=wanted.reshard_after_forward,
            prefetch=wanted.prefetch,
            mp_policy=MixedPrecisionPolicy(
                param_dtype=_dtype(policy.param_dtype),
                reduce_dtype=_dtype(policy.reduce_dtype),
                output_dtype=_dtype(policy.output_dtype),
                cast_forward_inputs=policy.cast_forward_inputs,
            ),
            offload_policy=CPUOffloadPolicy(torch.accelerator.is_available()) if wanted.offload_policy else OffloadPolicy(),
            tensor_parallel=table,
            sequence_parallel=wanted.sequence_parallel and axes.tp > 1,
            expert_parallel=axes.ep,
            context_parallel=wanted.cp_method,
        )
    except AutofuncError as error:
        raise ConfigError(f"distributed: {error}") from error


def setting_alone(axes: Axes, sharding: Sharding) -> Setting:
    """Return the setting of a run's stages as one process can build it: precision, and tokens cut over imagined ranks.

    The tp axis is left out, because it cuts layers: see `tensor_parallel_check.py`.
    """
    return Setting(precision=sharding.precision, context=imagined_axis(axes.cp, sharding.context_parallel))


def _table(plan: Mapping[str, str] | str | None) -> TensorParallel | Mapping[str, str] | str | None:
    if not isinstance(plan, str) or plan in SOURCES:
        return plan
    if not {".", ":", "/"} & set(plan):
        raise ConfigError(
            f"distributed.tp_plan: {quoted(plan)}; {one_of(plan, SOURCES)}. Or a mapping of patterns, or where to import "
            "one from, such as 'tables.py:my_table'"
        )
    found: Any = import_object(plan, "distributed.tp_plan")
    if callable(found) and not isinstance(found, TensorParallel):
        found = call(found, "distributed.tp_plan", plan)
    if not isinstance(found, (TensorParallel, Mapping)):
        raise ConfigError(
            f"distributed.tp_plan: {plan!r} is {type(found).__name__}; expected a mapping of patterns to placements, an "
            "af.TensorParallel, or a function that returns one"
        )
    return found


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)
