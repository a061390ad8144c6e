"""A captured forward is differentiated by its operators: gradients written by hand would be lost, so they are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode

from autofunc import tree
from autofunc.errors import ModelError

_HOOKS = ("_backward_hooks", "_backward_pre_hooks")


class _NoHooks(TorchFunctionMode):
    def __init__(self, what: str) -> None:
        super().__init__()
        self._what = what

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.register_hook:
            raise ModelError(f"{self._what} puts a hook on a gradient (register_hook), which a captured forward would lose")
        return func(*args, **(kwargs or {}))


@contextmanager
def without_hooks(module: nn.Module, what: str) -> Iterator[None]:
    """Refuse hooks on gradients, of modules and of tensors.

    Raises:
        ModelError: naming the part.
    """
    for name, part in module.named_modules():
        if any(getattr(part, hooks, None) for hooks in _HOOKS):
            raise ModelError(
                f"{what}: {type(part).__name__} ({name or 'the module itself'}) has backward hooks, which a captured "
                "forward would lose; remove them"
            )
    with _NoHooks(what):
        yield


def refuse_own_backward(outputs: Any, what: str) -> None:
    """Refuse what was made by a `torch.autograd.Function`.

    Args:
        outputs: what forward returned, with its autograd graph.
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
        # those of operators in a torch.library stay with the operator
        if isinstance(node, BackwardCFunction) and not type(node).__name__.startswith("GeneratedBackwardFor_"):
            name = type(node).__name__.removesuffix("Backward")
            advice = (
                "use torch.utils.checkpoint with use_reentrant=False"
                if name == "CheckpointFunction"
                else "write it with operators (a straight-through estimator is x + (f(x) - x).detach()), or as an operator "
                "of a torch.library with register_autograd"
            )
            raise ModelError(f"{what} applies {name}, whose backward a captured forward would lose; {advice}")
        left += [following for following, _ in node.next_functions]
