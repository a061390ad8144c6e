"""autofunc: pipeline parallelism as one pure function.

    import autofunc as af
    loss, grads = af.value_and_grad(pipe)(params, batch)

Names are imported when they are first used, so that `import autofunc.schedule` needs no torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autofunc import losses, random, schedule
    from autofunc.mesh import make_mesh
    from autofunc.model import Layer, Model
    from autofunc.optimizer import optimizer
    from autofunc.pipeline import pipeline, value_and_grad
    from autofunc.reference import reference_value_and_grad
    from autofunc.split import split

__version__ = "0.1.0"

_HOME = {
    "Layer": "autofunc.model",
    "Model": "autofunc.model",
    "make_mesh": "autofunc.mesh",
    "optimizer": "autofunc.optimizer",
    "pipeline": "autofunc.pipeline",
    "reference_value_and_grad": "autofunc.reference",
    "split": "autofunc.split",
    "value_and_grad": "autofunc.pipeline",
}
_MODULES = ("losses", "random", "schedule")

__all__ = [
    "Layer",
    "Model",
    "losses",
    "make_mesh",
    "optimizer",
    "pipeline",
    "random",
    "reference_value_and_grad",
    "schedule",
    "split",
    "value_and_grad",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"autofunc.{name}")
    raise AttributeError(f"module 'autofunc' has no attribute {name!r}")


class _Package(ModuleType):
    """Keeps public functions from being hidden by submodules of the same name (`af.split` lives in `autofunc.split`).

    The import system sets every imported submodule as an attribute of its package; for these names it must not.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
