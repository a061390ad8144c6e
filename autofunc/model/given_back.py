"""A model's trees as a torch state dict or module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from autofunc import tree
from autofunc.errors import ModelError, one_of
from autofunc.model.state import given_state

InTransformers = Callable[[tree.Nested], tuple[Mapping[str, Any], Mapping[str, Tensor]]]
"""Maps a full tree of parameters to (values of a config.json, state dict of the transformers model)."""


class GivenBack:
    """The part of a model that returns its trees to torch: the inverse of capturing a module."""

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
        """The model's name in messages."""
        return "the model"

    def state_dict(self, params: tree.Nested, state: tree.Nested | None = None) -> dict[str, Tensor]:
        """Return copies of parameters and state as a flat state dict.

        For a captured module it is the module's own: its names, tied parameters under each of theirs, and its persistent
        buffers, so that `module.load_state_dict` takes it. For a model of pure layers it is by path, including ties.

        Args:
            params: the full tree; on several processes `pipe.gather(params)`.
            state: the full tree, if layers keep state.

        Raises:
            ModelError: for leaves that are missing, unknown or of the wrong shape.

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
        """Return a copy of the captured module with these parameters, and with this state as its buffers.

        The copy differs only in its values; the captured module is not modified. Tied parameters stay tied.

        Args:
            params: the full tree; on several processes `pipe.gather(params)`.
            state: the full tree, if layers keep state.

        Raises:
            ModelError: for leaves that are missing, unknown or of the wrong shape; for a model that was not captured from a
                module.

        Example:
            model = af.from_module(module, batch)
            trained = model.to_module(params)
            trained.generate(ids)
        """
        raise ModelError(
            f"{self.title} is made of functions, so there is no module to return; model(params, batch) runs it, and "
            "model.state_dict(params) returns its parameters by path"
        )

    def with_state(self, params: tree.Nested, state: tree.Nested | None) -> dict[str, Tensor]:
        """Merge both trees into one flat tree, by path.

        Raises:
            ModelError: if layers keep state, and some is missing or has the wrong shape or dtype.
        """
        return {**tree.flatten(params), **given_state(self.state_spec, state, self.title, "model.init_state()")}
