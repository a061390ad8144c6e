"""torch.optim behind a pair of functions: `init` and `update`, with the state as an argument and a return value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor

from autofunc import tree
from autofunc.errors import ModelError, one_of
from autofunc.optim.groups import ALL, Groups
from autofunc.optim.part import Part
from autofunc.optim.state import OUTSIDE


class Optimizer:
    """One or several optimizers as an (init, update) pair; returned by `af.optimizer` and `af.optimizers`."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        rest = [part for part in self.parts if part.params is None]
        if len(rest) > 1:
            raise ModelError(
                f"{rest[0]!r} takes all parameters that the others leave, so none are left for {rest[1]!r}; give all but "
                "one of several optimizers params=[...], patterns of the paths it takes"
            )

    def __repr__(self) -> str:
        return repr(self.parts[0]) if len(self.parts) == 1 else f"optimizers({', '.join(map(repr, self.parts))})"

    @property
    def lr(self) -> float | None:
        """The optimizer's own learning rate, of the first if there are several; None if it has none."""
        return self.parts[0].lr

    def init(self, params: tree.Nested) -> TensorDict:
        """Return the state before the first update: empty, since torch's optimizers fill theirs in the first update.

        Raises:
            ModelError: for invalid options; on one process also for a pattern that matches no parameter. On several
                processes each may hold only a part of the model; use `check` with all of it.
        """
        flat = tree.flatten(params)
        taken: dict[Part, dict[str, Tensor]] = {part: {} for part in self.parts}
        for path, leaf in flat.items():
            part = self._part_of(path)
            if part is not None and part.fits(leaf):  # one that doesn't fit may be frozen, and get no gradient
                taken[part][path] = leaf
        for part, leaves in taken.items():
            if not _several_processes():
                part.check_patterns(leaves)
            examples = {part.groups.key_of(path, leaf): path for path, leaf in leaves.items()}
            part.make({path: flat[path] for path in examples.values()})
        return TensorDict({}, batch_size=[])

    def separate(self) -> dict[Part, Optimizer]:
        """Return each part as its own optimizer of any parameters, with its options but without groups."""
        return {part: Optimizer([replace(part, params=None, groups=Groups())]) for part in self.parts}

    def check(self, params: tree.Nested) -> None:
        """Refuse patterns that match none of a model's parameters, and parameters whose optimizer does not take them.

        Args:
            params: all trained parameters, of all ranks, such as `model.init(device="meta")`.

        Raises:
            ModelError: naming the nearest path.
        """
        flat = tree.flatten(params)
        for part, paths in self.assigned(flat):
            if part.params is None and not paths:
                raise ModelError(f"no parameter is left for {part!r}; leave it out, or give the others fewer patterns")
            mine = {path: flat[path] for path in paths}
            part.check_patterns(mine)
            part.check_shapes(mine)
            examples = {part.groups.key_of(path, leaf): path for path, leaf in mine.items()}
            part.make({path: torch.zeros((2,) * mine[path].dim()) for path in examples.values()})

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(
        self, grads: tree.Nested, state: TensorDict, params: tree.Nested, lr: float | None = None
    ) -> tuple[TensorDict, TensorDict]:
        """Take one step.

        `grads`, `state` and `params` are donated: the results reuse their memory, so do not use them again.

        Args:
            grads: a tree over the trainable paths of `params`.
            state: returned by `init` or the last `update`: one tree per slot of the optimizer, such as
                `state["exp_avg", "h", "0", "attn", "weight"]`, and the state that third-party optimizers keep in their
                groups, attributes or inner optimizers.
            params: a tree; paths without a gradient are returned unchanged.
            lr: learning rate of this step, instead of the optimizer's own. Groups and optimizers with a different rate keep
                its ratio.

        Returns:
            The new (params, state).

        Raises:
            ModelError: for a gradient without a parameter, parameters that no optimizer takes, and an optimizer whose step
                changes anything that isn't data.
        """
        weights, gradients, slots = tree.flatten(params), tree.flatten(grads), tree.flatten(state)
        unknown = [path for path in gradients if path not in weights]
        if unknown:
            raise ModelError(f"a gradient for {unknown[0]!r}, which is not a parameter; {one_of(unknown[0], weights)}")
        updated: dict[str, Tensor] = {}
        slots_after = {key: value for key, value in slots.items() if not key.startswith(OUTSIDE)}
        for number, (part, paths) in enumerate(self.assigned(gradients)):
            mine = {path: weights[path] for path in paths}
            leaves, kept = part.update(mine, gradients, slots, self._lr_of(part, lr), number)
            updated |= leaves
            slots_after |= kept
        return _rebuilt(params, weights, weights | updated), _rebuilt(state, slots, slots_after)

    def assigned(self, paths: Iterable[str]) -> list[tuple[Part, list[str]]]:
        """Return each part with the paths it takes: those its patterns are the first to match.

        Raises:
            ModelError: for a parameter that no part takes.
        """
        found: dict[Part, list[str]] = {part: [] for part in self.parts}
        for path in paths:
            part = self._part_of(path)
            if part is None:
                patterns = [pattern for part in self.parts for pattern in part.params or ()]
                raise ModelError(
                    f"no optimizer takes {path!r}; {one_of(path, patterns)}. An optimizer without params takes all that is "
                    "left; to freeze a parameter, leave it out of trainable"
                )
            found[part].append(path)
        return list(found.items())

    def _part_of(self, path: str) -> Part | None:
        rest = next((part for part in self.parts if part.params is None), None)
        return next((part for part in self.parts if part.takes(path)), rest)

    def _lr_of(self, part: Part, lr: float | None) -> float | None:
        """Return the learning rate of a part in a step, given that of the first."""
        if lr is None or part is self.parts[0] or part.lr == self.lr:
            return lr
        if part.lr is None or not self.lr:
            raise ModelError(
                f"update(lr={lr}) is the rate of {self.parts[0]!r}, and the rate of {part!r} cannot be derived from it; "
                "give both a learning rate, the first not 0"
            )
        return lr * (part.lr / self.lr)


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _rebuilt(given: tree.Nested, before: dict[str, Tensor], after: dict[str, Tensor]) -> TensorDict:
    """Return the donated tree itself if all its tensors were changed in place, as optimizers do; else a new one."""
    in_place = before.keys() == after.keys() and all(_place(before[path]) == _place(leaf) for path, leaf in after.items())
    if in_place and isinstance(given, TensorDict):
        return given
    return tree.to_tensordict(after)


def _place(leaf: Tensor) -> int:
    """Return the address of a tensor's memory; for a DTensor, of its local tensor's."""
    return (leaf.to_local() if hasattr(leaf, "to_local") else leaf).data_ptr()


def optimizer(
    factory: Callable[..., torch.optim.Optimizer],
    *,
    params: Sequence[str] | None = None,
    param_groups: Sequence[Mapping[str, Any]] = (),
    decay: str = ALL,
    whole: bool | None = None,
    **options: Any,
) -> Optimizer:
    """Turn a `torch.optim` class into an (init, update) pair.

    Args:
        factory: called as `factory(list_of_parameters, **options)`, such as `torch.optim.AdamW`.
        params: for `af.optimizers`: patterns of the paths it takes, such as ["h.*.weight"]; `*` crosses dots. By default
            all that the others leave.
        param_groups: overrides for some parameters: mappings with a "pattern" of paths, and options or "lr_mult" and
            "wd_mult", factors of the learning rate and weight decay. The first pattern a path matches applies.
        decay: "matrices" applies weight decay only to parameters with two or more dims, so not to biases and norms.
        whole: whether sharded parameters are gathered for it, so that every process steps on whole tensors; by default only
            for torch's optimizers that need it: Muon, Adafactor and Rprop.
        options: its options, such as `lr=3e-4`.

    Returns:
        An object with two functions:

        - `init(params)`: the state before the first update
        - `update(grads, state, params, lr=None)`: the new (params, state); `lr` is the learning rate of this update, for
          schedules. The results reuse the arguments' memory.

        The state holds everything the optimizer keeps, including what your own class keeps in its groups or attributes.

    Raises:
        ModelError: for `params` that is a string, and for invalid groups or an unknown decay.

    Example:
        opt = af.optimizer(torch.optim.AdamW, lr=3e-4)
        state = opt.init(params)
        params, state = opt.update(grads, state, params)
        params, state = opt.update(grads, state, params, lr=lr_at(step))  # af.lr_schedule
        opt = af.optimizer(torch.optim.AdamW, lr=3e-4, decay="matrices", param_groups=[{"pattern": "*.wq", "lr_mult": 0.1}])
    """
    if isinstance(params, str):
        raise ModelError(f"params={params!r}: expected a list of patterns, such as [{params!r}]")
    named = None if params is None else tuple(params)
    return Optimizer([Part(factory, options, Groups(tuple(param_groups), decay), named, whole)])


def optimizers(*each: Optimizer) -> Optimizer:
    """Combine several optimizers into one, each for the parameters that its `params` match.

    A parameter goes to the first optimizer with a matching pattern, else to the one without patterns.

    Args:
        each: returned by `af.optimizer`.

    Raises:
        ModelError: if there are none, or two have no `params`.

    Example:
        opt = af.optimizers(
            af.optimizer(torch.optim.AdamW, lr=3e-4, params=["wte.*", "wpe.*", "*.bias", "*ln_*"]),
            af.optimizer(torch.optim.Muon, lr=2e-2),
        )
    """
    if not each:
        raise ModelError("optimizers() needs at least one optimizer returned by af.optimizer")
    return Optimizer([part for one in each for part in one.parts])
