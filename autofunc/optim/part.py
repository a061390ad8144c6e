"""One optimizer of torch, made anew for each update of the parameters that it takes."""

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
"""Of the optimizers of torch 2.13 those that fail on DTensors. The others give the same numbers as on whole tensors."""


@dataclass(frozen=True, eq=False)
class Part:
    """An optimizer, its options, and which parameters it takes.

    Args:
        factory: called as `factory(groups_of_parameters, **options)`.
        options: its options.
        groups: options that some parameters have otherwise.
        params: patterns of the paths that it takes; None: all that no other takes.
        whole: whether it needs whole tensors where they are sharded; None: as torch's own are known to.
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
        """Of the optimizer."""
        return str(getattr(self.factory, "__name__", self.factory))

    @property
    def lr(self) -> float | None:
        """The learning rate of parameters in no group; None where it has none."""
        value = option_of("lr", self.factory, self.options)
        return None if value is None else float(value)

    def make(self, leaves: Flat) -> tuple[torch.optim.Optimizer, list[float]]:
        """The optimizer of some parameters, and the factor of the learning rate of each of its groups.

        Raises:
            ModelError: when the options do not fit it, or when it is none that takes gradients.
        """
        try:
            given, factors = self._given(leaves)
            made = self.factory(given, **copy.deepcopy(dict(self.options)))  # it may write to them
        except (TypeError, ValueError) as error:
            if isinstance(error, ModelError):
                raise
            raise ModelError(f"{self!r} cannot be made: {error}") from error
        unknown = self.groups.option_names() - made.defaults.keys()
        if unknown:
            name = min(unknown)
            raise ModelError(f"param_groups: {self.name} has no option {name!r}; {one_of(name, made.defaults)}")
        closure = inspect.signature(made.step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise ModelError(
                f"{self!r} runs the loss again in each step (step(closure)), and gradients are given here; use one whose "
                "step takes none, such as torch.optim.AdamW"
            )
        if isinstance(made, torch.optim.SparseAdam):
            raise ModelError(f"{self!r} takes sparse gradients alone, and all are dense here; use torch.optim.Adam")
        return made, factors

    def _given(self, leaves: Flat) -> tuple[list[Any], list[float]]:
        if self.groups == Groups():
            return list(leaves.values()) or [torch.zeros((1, 1))], [1.0]
        groups, factors = self.groups.of(leaves, self.factory, self.options)
        if not leaves:
            groups[-1]["params"] = [torch.zeros((1, 1))]
        return groups, factors

    def check_patterns(self, paths: Iterable[str]) -> None:
        """Refuse a pattern that matches none of the parameters that it takes.

        Raises:
            ModelError: naming the nearest path.
        """
        known = list(paths)
        check_patterns(self.params or (), known, "params pattern")
        check_patterns([group["pattern"] for group in self.groups.overrides], known, "param_groups pattern")

    def fits(self, leaf: Tensor) -> bool:
        """Whether it takes a parameter of this shape."""
        return self.factory is not torch.optim.Muon or leaf.dim() == 2

    def check_shapes(self, leaves: Flat) -> None:
        """Refuse parameters that it does not take.

        Raises:
            ModelError: naming them.
        """
        others = [path for path, leaf in leaves.items() if not self.fits(leaf)]
        if others:
            raise ModelError(
                f"{self.name} takes matrices alone, and of its parameters {len(others)} are none: {some_of(others)}. Give "
                "those to another of several optimizers, such as torch.optim.AdamW, by params: [...], patterns of their "
                "paths"
            )

    def update(
        self, weights: Flat, gradients: Flat, slots: Flat, lr: float | None, number: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One step, which changes the weights in place where the optimizer does.

        Args:
            weights: those that it takes and that have a gradient.
            gradients: of the same paths.
            slots: of all.
            lr: of this step; None: its own.
            number: among several.

        Returns:
            The new weights, and its slots.

        Raises:
            ModelError: when it takes no such parameters, or changes what is no data.
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
        """One step on whole tensors: of torch's own one parameter after the other, so that no more is whole at once."""
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
            if group["lr"] == now:  # which was of this step alone
                group["lr"] = own
        return {path: leaf.detach() for path, leaf in leaves.items()}, slots_of(optimizer, leaves) | outside.kept()

    @property
    def _needs_whole(self) -> bool:
        return self.factory in _NOT_OF_SHARDS if self.whole is None else self.whole

    @property
    def is_torchs(self) -> bool:
        """Whether it comes with torch, and so keeps nothing outside of its parameters' slots."""
        return is_torchs(self.factory)

    def takes(self, path: str) -> bool:
        """Whether it names a path."""
        return self.params is not None and tree.matches(path, self.params)


def _concerns(key: str, weights: Flat) -> bool:
    """Whether a slot is of one of these weights, or of no single one."""
    return key.startswith(OUTSIDE) or path_of_slot(key, weights) is not None


def _cut_like_its_weight(key: str, slot: Tensor, weights: Flat) -> Tensor:
    """A whole slot as it is kept: in parts where it has the shape of its weight, else in each process."""
    path = path_of_slot(key, weights)
    return slot if path is None or slot.shape != weights[path].shape else cut_as(weights[path], slot)
