"""Trees of a model given back to torch: as a state dict, or as a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from autofunc import tree
from autofunc.errors import ModelError, one_of, some_of
from autofunc.model.state import check_state

InTransformers = Callable[[tree.Nested], tuple[Mapping[str, Any], Mapping[str, Tensor]]]
"""From a full tree of parameters to the values of a config.json, and the weights as transformers has them."""


class GivenBack:
    """The part of a model that gives its trees back; it is the inverse of what took a module in."""

    @cached_property
    def spec(self) -> dict[str, Tensor]:
        """See `Model.spec`."""
        raise NotImplementedError

    @cached_property
    def state_spec(self) -> dict[str, Tensor]:
        """See `Model.state_spec`."""
        raise NotImplementedError

    def canonical(self, path: str) -> str:
        """See `Model.canonical`."""
        raise NotImplementedError

    @property
    def title(self) -> str:
        """What it is called in messages."""
        return "the model"

    def state_dict(self, params: tree.Nested, state: tree.Nested | None = None) -> dict[str, Tensor]:
        """Parameters and state as a flat state dict, of copies.

        Of a captured module it is the module's own: under its names, tied parameters under each of theirs, with the buffers
        that it stores, so that `module.load_state_dict` takes it. Of a model of pure layers it is by path, ties included.

        Args:
            params: the full tree; on several processes `pipe.gather(params)`.
            state: of a model whose layers keep some, the full tree.

        Raises:
            ModelError: for what is missing, unknown or of another shape.

        Example:
            module.load_state_dict(model.state_dict(params))
        """
        flat = self.with_state(params, state)
        canonical = {path: self.canonical(path) for path in self.spec}
        extra = [path for path in flat if path not in canonical.values() and path not in self.state_spec]
        if extra:
            raise ModelError(f"{self.title} has no parameter {extra[0]!r}; {one_of(extra[0], canonical.values())}")
        missing = [path for path in canonical.values() if path not in flat]
        if missing:
            raise ModelError(f"params have no {missing[0]!r}; give the full tree (pipe.gather); {one_of(missing[0], flat)}")
        copies = {path: leaf.detach().clone() for path, leaf in flat.items()}
        return {
            **{path: copies[name] for path, name in canonical.items()},
            **{path: copies[path] for path in self.state_spec},
        }

    def to_module(self, params: tree.Nested, state: tree.Nested | None = None) -> nn.Module:
        """A module with these parameters, and with this state as its buffers: a copy of the one that was captured.

        Everything but the values is as in that one, which stays as it is. Tied parameters are tied.

        Args:
            params: the full tree; on several processes `pipe.gather(params)`.
            state: of a model whose layers keep some, the full tree.

        Raises:
            ModelError: for what is missing, unknown or of another shape; for a model that was not captured from a module.

        Example:
            model = af.from_module(module, batch)
            trained = model.to_module(params)
            trained.generate(ids)
        """
        raise ModelError(
            f"{self.title} was made of functions, so there is no module to give back; model(params, batch) runs it, and "
            "model.state_dict(params) has its parameters by path"
        )

    def with_state(self, params: tree.Nested, state: tree.Nested | None) -> dict[str, Tensor]:
        """Both trees as one, by path.

        Raises:
            ModelError: when layers keep state, and some is missing or of another form.
        """
        if state is None and self.state_spec:
            raise ModelError(
                f"{self.title} keeps state ({some_of(self.state_spec)}): give state=model.init_state(), or what the last "
                "step returned"
            )
        flat = {} if state is None else tree.flatten(state)
        check_state(self.state_spec, flat)
        return {**tree.flatten(params), **flat}
