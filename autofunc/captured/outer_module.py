"""A module around a captured one: it computes something else with the same parameters, under the same paths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autofunc.captured.captures import Captures
from autofunc.captured.model import CapturedModel
from autofunc.captured.module import source_of
from autofunc.captured.module_source import ModuleSource

INSIDE = "inside"
"""The attribute of the outer module that holds the captured one; the outer module has no parameters of its own."""


def capture_around(around: nn.Module, model: CapturedModel, example: Mapping[str, Any]) -> CapturedModel:
    """Capture the outer module in eval mode: a model with the parameters of `model`, whose layers begin with `INSIDE`.

    Args:
        around: the outer module, with the module of `model` as its attribute `INSIDE`.
        model: a model of a module.
        example: a batch for `around`.

    Raises:
        ModelError: see `capture_module`.
    """
    source = _Around(around, source_of(model))
    return CapturedModel(
        Captures(source, in_eval_mode=True), example, config=model.config, trainable=model.trainable, notes=model.notes
    )  # fmt: skip


class _Around(ModuleSource):
    """See `Source`: the module inside keeps its parameters' names and the source of their values."""

    def __init__(self, around: nn.Module, inside: ModuleSource) -> None:
        super().__init__(around)
        self._inside = inside
        self.what, self.parameters = inside.what, inside.parameters

    @property
    def aliases(self) -> dict[str, list[str]]:
        """See `Source.aliases`."""
        return self._inside.aliases

    def canonical(self, name: str) -> str:
        """See `Source.canonical`."""
        return self._inside.canonical(name.removeprefix(f"{INSIDE}."))

    def weights(
        self, paths: Iterable[str], seed: int, device: torch.device, dtype: torch.dtype | None
    ) -> dict[str, Tensor]:  # fmt: skip
        """See `Source.weights`."""
        return self._inside.weights(paths, seed, device, dtype)

    def buffer(self, name: str) -> Tensor:
        """See `Source.buffer`."""
        own = name.removeprefix(f"{INSIDE}.")
        return super().buffer(name) if own == name else self._inside.buffer(own)

    def has_value(self, path: str) -> bool:
        """See `Source.has_value`."""
        return self._inside.has_value(path)
