"""`af.from_function`: any function of (params, batch) as a model, cut at its markers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autofunc import tree
from autofunc.batch import COUNTS
from autofunc.captured.captures import Branches, Captures
from autofunc.captured.model import CapturedModel
from autofunc.random import KEY


def from_function(
    function: Callable[[Mapping[str, Any], Mapping[str, Any]], Any],
    params: tree.Nested,
    example_batch: Mapping[str, Any],
    *,
    trainable: Sequence[str] = ("*",),
    branches: Branches = "example",
) -> CapturedModel:
    """Capture a function as a model: a layer begins at each `af.split_point(x, name)` that it passes.

    Args:
        function: `function(params, batch)`, pure: params are nested dicts, batch is a mapping without the key.
        params: a tree of parameters, with the model's initial weights; the paths are the model's.
        example_batch: a batch; only shapes and dtypes matter, unless the function decides by values.
        trainable: glob patterns of the parameters that get gradients.
        branches: how to treat decisions by values, see `af.from_module`.

    Returns:
        A model for `af.split`, whose `init()` copies `params`.

    Raises:
        ModelError: for a function that cannot be captured.

    Example:
        def net(params, batch):
            x = torch.tanh(batch["x"] @ params["first"])
            x = af.split_point(x, "second")
            return x @ params["second"]

        model = af.from_function(net, {"first": torch.randn(4, 8), "second": torch.randn(8, 2)}, {"x": torch.randn(6, 4)})
        stages = af.split(model, ["second"])
    """
    source = FunctionSource(function, params)
    return CapturedModel(Captures(source, branches), example_batch, trainable=trainable)


class _Module(nn.Module):
    """A function as a module, with its parameters in a list."""

    def __init__(self, function: Callable[..., Any], leaves: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._function, self._paths = function, list(leaves)
        for number, leaf in enumerate(leaves.values()):
            self.register_parameter(f"leaf_{number}", nn.Parameter(leaf.detach(), requires_grad=leaf.is_floating_point()))

    def forward(self, batch: Mapping[str, Any]) -> Any:
        leaves = (self.get_parameter(f"leaf_{number}") for number in range(len(self._paths)))
        return self._function(tree.nest(dict(zip(self._paths, leaves, strict=True))), batch)


class FunctionSource:
    """See `Source`."""

    aliases: Mapping[str, Sequence[str]] = {}
    module_names: Sequence[str] = ()
    key_name = KEY

    def __init__(self, function: Callable[..., Any], params: tree.Nested) -> None:
        self.what = getattr(function, "__name__", type(function).__name__)
        self.parameters = tree.flatten(params)
        self.module = _Module(function, self.parameters)

    def canonical(self, name: str) -> str:
        """See `Source.canonical`."""
        return list(self.parameters)[int(name.removeprefix("leaf_"))]

    def select(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """See `Source.select`."""
        return {name: value for name, value in batch.items() if name not in (KEY, COUNTS)}

    def arguments(self, batch: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """See `Source.arguments`."""
        return (dict(batch),), {}

    def has_value(self, path: str) -> bool:
        """See `Source.has_value`."""
        return True

    def weights(
        self, paths: Iterable[str], seed: int, device: torch.device, dtype: torch.dtype | None
    ) -> dict[str, Tensor]:  # fmt: skip
        """See `Source.weights`."""
        leaves = {path: self.parameters[path].detach() for path in paths}
        return {
            path: leaf.to(device=device, dtype=dtype if leaf.is_floating_point() else None, copy=True)
            for path, leaf in leaves.items()
        }

    def buffer(self, name: str) -> Tensor:
        """See `Source.buffer`."""
        return self.module.get_buffer(name)
