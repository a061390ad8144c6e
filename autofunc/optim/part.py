"""One torch optimizer, rebuilt for each update of its parameters."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from autofunc import tree
from autofunc.errors import ModelError, one_of, some_of
from autofunc.optim.groups import Groups, check_patterns, option_of
from autofunc.optim.set_lr import set_lr
from autofunc.optim.state import OUTSIDE, Outside, is_torchs, load_slots, path_of_slot, slots_of
from autofunc.shard.dtensors import cut_as, gathered, local

Flat = Mapping[str, Tensor]

_NOT_OF_SHARDS = (torch.optim.Muon, torch.optim.Adafactor, torch.optim.Rprop)
"""The optimizers of torch 2.13 that fail on DTensors. The others compute the same numbers as on whole tensors."""


@dataclass(frozen=True, eq=False)
class Part:
    """An optimizer, its options, and the parameters it takes.

    Args:
        factory: called as `factory(groups_of_parameters, **options)`.
        options: its options.
        groups: overrides of the options for some parameters.
        params: patterns of the paths it takes; None takes all that no other part takes.
        whole: whether it needs sharded tensors whole; None decides by the known needs of torch's own optimizers.
    """

    factory: Callable[..., torch.optim.Optimizer]
    options: Mapping[str, Any]
    groups: Groups = field(default_factory=Groups)
    params: tuple[str, ...] | None = None
    whole: bool | None = None

    def __repr__(self) -> str:
        shown = dict(self.options)
        if self.params is not None:
            shown["params"] = list(self.params)
        if self.groups.overrides:
            shown["param_groups"] = list(self.groups.overrides)
        if self.groups != Groups(self.groups.overrides):
            shown["decay"] = self.groups.decay
        return f"optimizer({', '.join([self.name, *(f'{name}={value!r}' for name, value in shown.items())])})"

    @property
    def name(self) -> str:
        """The optimizer's name."""
        return str(getattr(self.factory, "__name__", self.factory))

    @property
    def lr(self) -> float | None:
        """The learning rate of parameters in no group; None if the optimizer has none."""
        value = option_of("lr", self.factory, self.options)
        return None if value is None else float(value)

    def make(self, leaves: Flat) -> tuple[torch.optim.Optimizer, list[float]]:
        """Build the optimizer of some parameters; return it with the learning rate factor of each of its groups.

        Raises:
            ModelError: for invalid options, and for an optimizer that needs a closure or sparse gradients.
        """
        try:
            given, factors = self._given(leaves)
            made = self.factory(given, **copy.deepcopy(dict(self.options)))  # it may write to them
        except (TypeError, ValueError) as error:
            if isinstance(error, ModelError):
                raise
            raise ModelError(f"{self!r} cannot be built: {error}") from error
        unknown = self.groups.option_names() - made.defaults.keys()
        if unknown:
            name = min(unknown)
            raise ModelError(f"param_groups: {self.name} has no option {name!r}; {one_of(name, made.defaults)}")
        closure = inspect.signature(made.step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise ModelError(
                f"{self!r} recomputes the loss in each step (step(closure)), but here gradients are passed in; use one "
                "whose step needs no closure, such as torch.optim.AdamW"
            )
        if isinstance(made, torch.optim.SparseAdam):
            raise ModelError(f"{self!r} takes only sparse gradients, and all are dense here; use torch.optim.Adam")
        return made, factors

    def _given(self, leaves: Flat) -> tuple[list[Any], list[float]]:
        if self.groups == Groups():
            return list(leaves.values()) or [torch.zeros((1, 1))], [1.0]
        groups, factors = self.groups.of(leaves, self.factory, self.options)
        if not leaves:
            groups[-1]["params"] = [torch.zeros((1, 1))]
        return groups, factors

    def check_patterns(self, paths: Iterable[str]) -> None:
        """Refuse a pattern that matches none of its parameters.

        Raises:
            ModelError: naming the nearest path.
        """
        known = list(paths)
        check_patterns(self.params or (), known, "params pattern")
        check_patterns([group["pattern"] for group in self.groups.overrides], known, "param_groups pattern")

    def fits(self, leaf: Tensor) -> bool:
        """Return whether it takes a parameter of this shape."""
        return self.factory is not torch.optim.Muon or leaf.dim() == 2

    def check_shapes(self, leaves: Flat) -> None:
        """Refuse parameters whose shape it does not take.

        Raises:
            ModelError: naming them.
        """
        others = [path for path, leaf in leaves.items() if not self.fits(leaf)]
        if others:
            raise ModelError(
                f"{self.name} takes only matrices, so it cannot train {len(others)} of its parameters: {some_of(others)}. "
                "Give those to another optimizer, such as torch.optim.AdamW, with params: [...], patterns of their paths"
            )

    def update(
        self, weights: Flat, gradients: Flat, slots: Flat, lr: float | None, number: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Take one step; weights change in place if the optimizer does so.

        Args:
            weights: its parameters that have a gradient, by path.
            gradients: of the same paths.
            slots: of all optimizers.
            lr: of this step; None takes its own.
            number: of this part among several.

        Returns:
            (new weights, its slots).

        Raises:
            ModelError: if it does not take such parameters, or its step changes anything that isn't data.
        """
        self.check_shapes(weights)
        if self.is_torchs and not weights:
            return {}, {}
        if self._needs_whole and any(isinstance(leaf, DTensor) for leaf in weights.values()):
            return self._update_whole(weights, gradients, slots, lr, number)
        return self._update(weights, gradients, slots, lr, number)

    def _update_whole(
        self, weights: Flat, gradients: Flat, slots: Flat, lr: float | None, number: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Take one step on whole tensors; torch's own optimizers step one parameter at a time, to gather only one."""
        kept: dict[str, Tensor] = {}
        for paths in [[path] for path in weights] if self.is_torchs else [list(weights)]:
            mine = {path: weights[path] for path in paths}
            whole = {path: gathered(leaf) for path, leaf in mine.items()}
            whole_slots = {key: gathered(slot) for key, slot in slots.items() if _concerns(key, mine)}
            whole, made = self._update(whole, {path: gathered(gradients[path]) for path in paths}, whole_slots, lr, number)
            for path, leaf in mine.items():
                local(leaf).copy_(local(cut_as(leaf, whole[path])))
            kept |= {key: _cut_like_its_weight(key, slot, mine) for key, slot in made.items()}
        return dict(weights), kept

    def _update(
        self, weights: Flat, gradients: Flat, slots: Flat, lr: float | None, number: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        leaves = {path: torch.nn.Parameter(leaf) for path, leaf in weights.items()}
        for path, leaf in leaves.items():
            leaf.grad = gradients[path]
        optimizer, factors = self.make(leaves)
        outside = Outside(optimizer, leaves, number)
        outside.load(slots)
        load_slots(optimizer, leaves, slots)
        before = set_lr(optimizer, lr, factors) if lr is not None else []
        optimizer.step()
        for group, own, now in before:
            if group["lr"] == now:  # unless the step changed it, restore the rate from before this update
                group["lr"] = own
        return {path: leaf.detach() for path, leaf in leaves.items()}, slots_of(optimizer, leaves) | outside.kept()

    @property
    def _needs_whole(self) -> bool:
        return self.factory in _NOT_OF_SHARDS if self.whole is None else self.whole

    @property
    def is_torchs(self) -> bool:
        """True if it comes with torch, and so keeps nothing outside its parameters' slots."""
        return is_torchs(self.factory)

    def takes(self, path: str) -> bool:
        """Return whether one of its patterns matches a path."""
        return self.params is not None and tree.matches(path, self.params)


def _concerns(key: str, weights: Flat) -> bool:
    """Return whether a slot belongs to one of these weights, or to no weight at all."""
    return key.startswith(OUTSIDE) or path_of_slot(key, weights) is not None


def _cut_like_its_weight(key: str, slot: Tensor, weights: Flat) -> Tensor:
    """Return a whole slot in its stored form: sharded if it has its weight's shape, else whole in each process."""
    path = path_of_slot(key, weights)
    return slot if path is None or slot.shape != weights[path].shape else cut_as(weights[path], slot)
