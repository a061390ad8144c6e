"""CTC losses whose lengths are tensors, as one operator: its result's shape does not depend on the lengths.

torch's own operator also returns a tensor whose shape depends on the longest target, and may take targets whose number
depends on data: those that `masked_select` picks from a table. Both stay inside this operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from autofunc.errors import ModelError

_LOSS = "Tensor log_probs, Tensor targets, Tensor? mask, Tensor input_lengths, Tensor target_lengths"
_ARGUMENTS = f"{_LOSS}, int blank, bool no_infinity"
torch.library.define("autofunc::ctc", f"({_ARGUMENTS}) -> Tensor")
torch.library.define("autofunc::ctc_backward", f"(Tensor grad, {_ARGUMENTS}) -> Tensor")


@torch.library.impl("autofunc::ctc", "CompositeExplicitAutograd")
def _losses(
    log_probs: Tensor, targets: Tensor, mask: Tensor | None, inputs: Tensor, lengths: Tensor, blank: int, no_infinity: bool
) -> Tensor:
    """Return each row's loss: (rows,), in the dtype of `log_probs`, which are (steps, rows, classes)."""
    chosen = targets if mask is None else targets.masked_select(mask)
    losses: Tensor = torch.ops.aten._ctc_loss.Tensor(log_probs, chosen, inputs, lengths, blank, no_infinity)[0]
    return losses


@torch.library.impl("autofunc::ctc_backward", "CompositeExplicitAutograd")
def _gradient(
    grad: Tensor, log_probs: Tensor, targets: Tensor, mask: Tensor | None, inputs: Tensor, lengths: Tensor, blank: int,
    no_infinity: bool,
) -> Tensor:  # fmt: skip
    """Return the gradient of `log_probs`. The forward's intermediates are recomputed: their size is not known outside."""
    chosen = targets if mask is None else targets.masked_select(mask)
    losses, reached = torch.ops.aten._ctc_loss.Tensor(log_probs, chosen, inputs, lengths, blank, no_infinity)
    found: Tensor = torch.ops.aten._ctc_loss_backward.Tensor(
        grad, log_probs, chosen, inputs, lengths, losses, reached, blank, no_infinity
    )
    return found


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.blank, ctx.no_infinity = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    made = torch.ops.autofunc.ctc_backward(grad, *ctx.saved_tensors, ctx.blank, ctx.no_infinity)
    return made, None, None, None, None, None, None


torch.library.register_fake("autofunc::ctc", lambda log_probs, *_: log_probs.new_empty(log_probs.shape[1]))
torch.library.register_fake("autofunc::ctc_backward", lambda grad, log_probs, *_: torch.empty_like(log_probs))
torch.library.register_autograd("autofunc::ctc", _backward, setup_context=_keep)


class Selected:
    """What `table.masked_select(mask)` returns, made only when needed; a CTC loss does not need it.

    Args:
        table: integers, (rows, longest target).
        mask: bool, of the same shape.
    """

    def __init__(self, table: Tensor, mask: Tensor) -> None:
        self.table, self.mask = table, mask
        self._versions = (table._version, mask._version)

    def unchanged(self) -> Selected:
        """Return itself.

        Raises:
            ModelError: if the table or mask was written to since.
        """
        if self._versions != (self.table._version, self.mask._version):
            raise ModelError("forward writes to a tensor after masked_select read it; write to a clone")
        return self

    @property
    def tensor(self) -> Tensor:
        """The selected elements."""
        self.unchanged()
        return self.table[self.mask]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor, name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*map(_made, args), **{name: _made(value) for name, value in (kwargs or {}).items()})


def _made(value: Any) -> Any:
    return value.tensor if isinstance(value, Selected) else value


def _through_tensor(name: str) -> Callable[..., Any]:
    return lambda self, *args: getattr(self.tensor, name)(*map(_made, args))


_READ_BY_OPERATORS = (
    "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "mod", "pow", "neg", "abs", "and", "or",
    "xor", "invert", "eq", "ne", "lt", "le", "gt", "ge", "getitem", "len", "iter", "bool", "int", "float", "index",
)  # fmt: skip
for _name in _READ_BY_OPERATORS:
    setattr(Selected, f"__{_name}__", _through_tensor(f"__{_name}__"))


def _masked_select(*args: Any, **kwargs: Any) -> Any:
    if len(args) == 2 and not kwargs and _is_table(*args):
        return Selected(*args)
    return torch.masked_select(*args, **kwargs)


def _is_table(table: Tensor, mask: Any) -> bool:
    integers = not (table.is_floating_point() or table.is_complex() or table.dtype == torch.bool)
    return integers and table.dim() == 2 and isinstance(mask, Tensor) and mask.shape == table.shape


def _ctc_loss(
    log_probs: Tensor,
    targets: Any,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """Compute what `torch.nn.functional.ctc_loss` does."""
    if log_probs.dim() != 3 or not (isinstance(input_lengths, Tensor) and isinstance(target_lengths, Tensor)):
        return functional.ctc_loss(
            log_probs, _made(targets), input_lengths, target_lengths, blank, reduction, zero_infinity
        )  # fmt: skip
    table, mask = (targets.table, targets.unchanged().mask) if isinstance(targets, Selected) else (targets, None)
    losses: Tensor = torch.ops.autofunc.ctc(
        log_probs, table, mask, input_lengths, target_lengths, blank, zero_infinity
    )  # fmt: skip
    if zero_infinity:
        losses = torch.where(losses == float("inf"), 0.0, losses)
    if reduction == "mean":
        return (losses / target_lengths.clamp_min(1)).mean()
    return losses.sum() if reduction == "sum" else losses


LENGTHS_AS_TENSORS: dict[Any, Callable[..., Any]] = {
    torch.masked_select: _masked_select,
    Tensor.masked_select: _masked_select,
    functional.ctc_loss: _ctc_loss,
}
"""By torch function: the one called instead, so that CTC losses take lengths that are tensors."""
