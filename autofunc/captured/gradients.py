"""Refusal of gradients written by hand: a captured forward is differentiated by its operators and would lose them."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from autofunc import tree
from autofunc.errors import ModelError
from autofunc.fake import user_line

_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
_HOOKS = ("_backward_hooks", "_backward_pre_hooks")


def replaced_functions(what: str) -> dict[Any, Callable[..., Any]]:
    """Return, by torch function, the one to call instead while a forward is captured.

    Args:
        what: the module, for messages.
    """

    def register_hook(*_: Any, **__: Any) -> None:
        raise ModelError(f"{what} puts a hook on a gradient (register_hook), which a captured forward would lose")

    def grad(*_: Any, **__: Any) -> None:
        raise ModelError(
            f"{what} differentiates inside its forward (torch.autograd.grad; {user_line(traceback.extract_stack())}), "
            "which a captured forward cannot do; write that gradient with operators, or the model as af.Layer functions "
            "for engine='eager'"
        )

    return {Tensor.register_hook: register_hook, torch.autograd.grad: grad, _DATA: Tensor.detach}


def refuse_parameter_hooks(module: nn.Module, what: str) -> None:
    """Refuse hooks on the gradients of parameters.

    Raises:
        ModelError: naming the parameter.
    """
    for name, leaf in module.named_parameters():
        if leaf._backward_hooks or leaf._post_accumulate_grad_hooks:
            raise ModelError(
                f"{what}: the gradient of {name!r} has a hook, which would not run; remove it, and change the gradients "
                "that af.value_and_grad returns instead"
            )


def refuse_module_hooks(module: nn.Module, what: str) -> None:
    """Refuse hooks on the gradients of modules' inputs and outputs.

    Raises:
        ModelError: naming the part.
    """
    for name, part in module.named_modules():
        if any(getattr(part, hooks, None) for hooks in _HOOKS):
            raise ModelError(
                f"{what}: {type(part).__name__} ({name or 'the module itself'}) has backward hooks, which a captured "
                "forward would lose; remove them"
            )


def refuse_own_backward(outputs: Any, what: str) -> None:
    """Refuse outputs made by a `torch.autograd.Function` that was not recorded.

    Args:
        outputs: those of forward, with their autograd graph.
        what: the module, for messages.

    Raises:
        ModelError: naming the function.
    """
    left: list[Any] = [leaf.grad_fn for leaf in tree.leaves_and_spec(outputs)[0] if isinstance(leaf, Tensor)]
    seen: set[Any] = set()
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        # functions of torch.library operators stay with the operator
        if isinstance(node, BackwardCFunction) and not type(node).__name__.startswith("GeneratedBackwardFor_"):
            name = type(node).__name__.removesuffix("Backward")
            raise ModelError(
                f"{what} applies {name} in a way that cannot be traced, and a captured forward would lose its backward; "
                f"call {name}.apply"
            )
        left += [following for following, _ in node.next_functions]
