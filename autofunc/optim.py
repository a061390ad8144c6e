"""torch.optim behind a pair of functions: `init` and `update`, with the state as an argument and a return value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from autofunc import tree
from autofunc.errors import ModelError, one_of


class Optimizer:
    """An optimizer as two functions; made by `af.optimizer`."""

    def __init__(self, factory: Callable[..., torch.optim.Optimizer], options: dict[str, Any]) -> None:
        self._factory = factory
        self._options = options

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self._options.items())
        return f"optimizer({getattr(self._factory, '__name__', self._factory)}, {options})"

    def init(self, params: tree.Nested) -> TensorDict:
        """The state before the first update: empty, since torch's optimizers fill theirs at the first update.

        Raises:
            ModelError: when the options do not fit the optimizer.
        """
        self._make(list(tree.flatten(params).values())[:1])
        return TensorDict({}, batch_size=[])

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(
        self, grads: tree.Nested, state: TensorDict, params: tree.Nested, lr: float | None = None
    ) -> tuple[TensorDict, TensorDict]:
        """One step.

        `grads`, `state` and `params` are donated: the results reuse their memory, so do not use them again.

        Args:
            grads: a tree over the trainable paths of `params`.
            state: what `init` or the last `update` returned: one tree per slot of the optimizer, such as
                `state["exp_avg", "h", "0", "attn", "weight"]`.
            params: a tree; paths without a gradient are returned unchanged.
            lr: learning rate of this step, instead of the one given at first.

        Returns:
            The new (params, state).
        """
        weights, gradients, slots = tree.flatten(params), tree.flatten(grads), tree.flatten(state)
        unknown = [path for path in gradients if path not in weights]
        if unknown:
            raise ModelError(f"a gradient for {unknown[0]!r}, which is no parameter; {one_of(unknown[0], weights)}")
        leaves = {path: torch.nn.Parameter(weights[path]) for path in gradients}
        for path, leaf in leaves.items():
            leaf.grad = gradients[path]
        optimizer = self._make(list(leaves.values()))
        if lr is not None:
            for group in optimizer.param_groups:
                group["lr"] = lr
        for slot_path, value in slots.items():
            slot, _, path = slot_path.partition(".")
            if path in leaves:
                optimizer.state[leaves[path]][slot] = value
        optimizer.step()
        updated = {path: leaf.detach() for path, leaf in leaves.items()}
        slots_after = dict(slots)
        for path, leaf in leaves.items():
            for slot, value in optimizer.state[leaf].items():
                if value is not None:
                    slots_after[tree.join(slot, path)] = torch.as_tensor(value)
        return _rebuilt(params, weights, weights | updated), _rebuilt(state, slots, slots_after)

    def _make(self, leaves: list[Tensor]) -> torch.optim.Optimizer:
        try:
            return self._factory(leaves or [torch.zeros(())], **self._options)
        except (TypeError, ValueError) as error:
            raise ModelError(f"{self!r} cannot be made: {error}") from error


def _rebuilt(given: tree.Nested, before: dict[str, Tensor], after: dict[str, Tensor]) -> TensorDict:
    """The donated tree itself when all its tensors were changed in place, as optimizers do; else a new one."""
    in_place = before.keys() == after.keys() and all(_place(before[path]) == _place(leaf) for path, leaf in after.items())
    if in_place and isinstance(given, TensorDict):
        return given
    return tree.to_tensordict(after)


def _place(leaf: Tensor) -> int:
    """Where a tensor's memory lies; a DTensor has none but that of its local tensor."""
    return (leaf.to_local() if hasattr(leaf, "to_local") else leaf).data_ptr()


def optimizer(factory: Callable[..., torch.optim.Optimizer], **options: Any) -> Optimizer:
    """Turn a `torch.optim` class into an (init, update) pair.

    Args:
        factory: called as `factory(list_of_parameters, **options)`, such as `torch.optim.AdamW`.
        options: its options, such as `lr=3e-4`.

    Example:
        opt = af.optimizer(torch.optim.AdamW, lr=3e-4)
        state = opt.init(params)
        params, state = opt.update(grads, state, params)
    """
    return Optimizer(factory, options)
