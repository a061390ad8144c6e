"""autofunc: pipeline parallelism as one pure function.

    import autofunc as af
    loss, grads = af.value_and_grad(pipe)(params, batch)

Names are imported when they are first used, so that `import autofunc.schedule` needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autofunc import errors, losses, random, schedule, tree
    from autofunc.adapters import load_adapter, lora, merge_lora, save_adapter
    from autofunc.automodel import AutoModel, register_architecture, register_modeling_path
    from autofunc.benchmark import bench
    from autofunc.captured import empty_weights, from_function
    from autofunc.checkpoint import Checkpoint, load, save
    from autofunc.checks import check
    from autofunc.errors import AutofuncError
    from autofunc.experts import Groups, mean_over_expert_ranks, routed_experts
    from autofunc.generation import generate
    from autofunc.markers import split_point
    from autofunc.mesh import data_coordinate, make_mesh
    from autofunc.model import Layer, Model, TensorParallel
    from autofunc.optim import LearningRate, Optimizer, ema, lr_schedule, optimizer, optimizers
    from autofunc.pipe import Pipeline
    from autofunc.reference import reference_value_and_grad
    from autofunc.runtime.pair_groups import Transfers
    from autofunc.runtime.watchdog import watchdog
    from autofunc.shard import Sharding
    from autofunc.splitting import Stage, split
    from autofunc.spread import constrain
    from autofunc.transform import pipeline, value_and_grad
    from autofunc.whole_module import from_module

__version__ = "0.2.0"

_HOME = {
    "AutoModel": "autofunc.automodel",
    "AutofuncError": "autofunc.errors",
    "Checkpoint": "autofunc.checkpoint",
    "Groups": "autofunc.experts",
    "Layer": "autofunc.model",
    "LearningRate": "autofunc.optim",
    "Model": "autofunc.model",
    "Optimizer": "autofunc.optim",
    "Pipeline": "autofunc.pipe",
    "Sharding": "autofunc.shard",
    "Stage": "autofunc.splitting",
    "TensorParallel": "autofunc.model",
    "Transfers": "autofunc.runtime.pair_groups",
    "bench": "autofunc.benchmark",
    "check": "autofunc.checks",
    "constrain": "autofunc.spread",
    "data_coordinate": "autofunc.mesh",
    "ema": "autofunc.optim",
    "empty_weights": "autofunc.captured",
    "from_function": "autofunc.captured",
    "from_module": "autofunc.whole_module",
    "generate": "autofunc.generation",
    "load": "autofunc.checkpoint",
    "load_adapter": "autofunc.adapters",
    "lora": "autofunc.adapters",
    "lr_schedule": "autofunc.optim",
    "make_mesh": "autofunc.mesh",
    "mean_over_expert_ranks": "autofunc.experts",
    "merge_lora": "autofunc.adapters",
    "optimizer": "autofunc.optim",
    "optimizers": "autofunc.optim",
    "pipeline": "autofunc.transform",
    "reference_value_and_grad": "autofunc.reference",
    "register_architecture": "autofunc.automodel",
    "register_modeling_path": "autofunc.automodel",
    "routed_experts": "autofunc.experts",
    "save": "autofunc.checkpoint",
    "save_adapter": "autofunc.adapters",
    "split": "autofunc.splitting",
    "split_point": "autofunc.markers",
    "value_and_grad": "autofunc.transform",
    "watchdog": "autofunc.runtime.watchdog",
}
_MODULES = ("errors", "losses", "random", "schedule", "tree")

__all__ = [
    "AutoModel",
    "AutofuncError",
    "Checkpoint",
    "Groups",
    "Layer",
    "LearningRate",
    "Model",
    "Optimizer",
    "Pipeline",
    "Sharding",
    "Stage",
    "TensorParallel",
    "Transfers",
    "bench",
    "check",
    "constrain",
    "data_coordinate",
    "ema",
    "empty_weights",
    "errors",
    "from_function",
    "from_module",
    "generate",
    "load",
    "load_adapter",
    "lora",
    "losses",
    "lr_schedule",
    "make_mesh",
    "mean_over_expert_ranks",
    "merge_lora",
    "optimizer",
    "optimizers",
    "pipeline",
    "random",
    "reference_value_and_grad",
    "register_architecture",
    "register_modeling_path",
    "routed_experts",
    "save",
    "save_adapter",
    "schedule",
    "split",
    "split_point",
    "tree",
    "value_and_grad",
    "watchdog",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"autofunc.{name}")
    raise AttributeError(f"module 'autofunc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
