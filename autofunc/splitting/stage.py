"""A stage: a contiguous run of layers as one pure function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from autofunc import tree
from autofunc.model import Model, State, check_state
from autofunc.model.layer import Apply
from autofunc.random import as_key


@dataclass(frozen=True, eq=False)
class Stage:
    """A contiguous run of a model's layers. It holds no parameters, only the functions and the names.

    A stage refers to its parameters by the names its layers use (`holders`). A tied one is looked up under its canonical
    path, and is a separate leaf in every stage and layer that uses it.
    """

    model: Model
    index: int
    layers: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Stage({self.index}: {self.layers[0]} .. {self.layers[-1]})"

    @property
    def title(self) -> str:
        """Its name in messages."""
        return f"stage {self.index} (layers {self.layers[0]} .. {self.layers[-1]})"

    @property
    def is_last(self) -> bool:
        """True for the stage that ends the model."""
        return self.layers[-1] == next(reversed(self.model.layers))

    @property
    def functions(self) -> list[Apply]:
        """The functions of its layers, in order."""
        return [self.model.layers[name].apply for name in self.layers]

    @cached_property
    def holders(self) -> tuple[str, ...]:
        """Paths of the parameters as this stage's layers see them, aliases included, sorted."""
        return tuple(path for path in self.model.spec if self.model.layer_of(path) in self.layers)

    @cached_property
    def paths(self) -> tuple[str, ...]:
        """Canonical paths of the parameters this stage needs, sorted."""
        return tuple(sorted({self.model.canonical(path) for path in self.holders}, key=tree.split_path))

    @cached_property
    def trainable(self) -> tuple[bool, ...]:
        """For each holder, whether it gets a gradient."""
        return tuple(self.model.is_trainable(path) for path in self.holders)

    @cached_property
    def trainable_holders(self) -> tuple[str, ...]:
        """The holders that get a gradient, sorted."""
        return tuple(path for path, wanted in zip(self.holders, self.trainable, strict=True) if wanted)

    def by_layer(self, values: Sequence[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """Group values of the trainable holders by path, one dict per layer that has any, in layer order."""
        groups: dict[str, dict[str, torch.Tensor]] = {name: {} for name in self.layers}
        for path, value in zip(self.trainable_holders, values, strict=True):
            groups[self.model.layer_of(path) or ""][path] = value
        return [group for group in groups.values() if group]

    @cached_property
    def _places(self) -> list[tuple[str, tuple[str, ...], str]]:
        """For each holder: its layer, and the keys below the layer that lead to the leaf."""
        places = []
        for path in self.holders:
            name = self.model.layer_of(path)
            assert name is not None
            *folders, last = tree.split_path(self.model.inner_path(path))
            places.append((name, tuple(folders), last))
        return places

    @cached_property
    def states(self) -> tuple[str, ...]:
        """Paths of the state its layers keep, sorted."""
        return tuple(path for path in self.model.state_spec if self.model.layer_of(path) in self.layers)

    def bind_state(self, leaves: Sequence[torch.Tensor]) -> Mapping[str, State]:
        """Group leaves (in the order of `states`) by layer."""
        return self.model.state_by_layer(dict(zip(self.states, leaves, strict=True)))

    def state_leaves(self, states: Mapping[str, State]) -> list[torch.Tensor]:
        """Return the leaves of states, in the order of `states`: the inverse of `bind_state`."""
        return list(self.model.flat_state(states, self.states).values())

    def leaves(self, params: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Return the tensors of `holders`, in order, from a flat tree with at least this stage's canonical paths."""
        return [self.model.lookup(params, path) for path in self.holders]

    def bind(self, leaves: list[torch.Tensor]) -> dict[str, dict[str, Any]]:
        """Group leaves (in the order of `holders`) into the nested dicts that the layers receive."""
        bound: dict[str, dict[str, Any]] = {name: {} for name in self.layers}
        for (name, folders, last), leaf in zip(self._places, leaves, strict=True):
            node = bound[name]
            for folder in folders:
                node = node.setdefault(folder, {})
            node[last] = leaf
        return bound

    def apply(self, params: tree.Nested, x: Any, batch: Mapping[str, Any], state: tree.Nested | None = None) -> Any:
        """Run the stage: pure, on any tree with at least this stage's canonical paths.

        Args:
            params: a tree of parameters.
            x: the output of the stage before; None for the first stage.
            batch: the microbatch.
            state: a tree of state, for a stage that keeps some.

        Returns:
            x; if a state was given, x and a tree of this stage's new state.
        """
        name = self.model.key_name
        batch = {**batch, name: as_key(batch.get(name))}
        flat = tree.flatten(params)
        specialised = self.model.specialise(batch, {path: leaf.dtype for path, leaf in flat.items()})
        given = {} if state is None else tree.flatten(state)
        check_state({path: self.model.state_spec[path] for path in self.states}, given)
        states = self.bind_state([given[path] for path in self.states])
        x, states = specialised.run(self.layers, self.bind(self.leaves(flat)), x, batch, states)
        if state is None:
            return x
        return x, tree.to_tensordict(self.model.flat_state(states, self.states))
