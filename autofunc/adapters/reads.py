"""How operators read a weight: products with it, transposes, conversions, lookups and anything else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from autofunc import tree

_TURNED = {"t", "T", "mT", "H", "mH", "adjoint", "numpy_T", "t_copy"}
_TURNED_BY_DIMS = {"transpose", "swapaxes", "swapdims", "permute"}
_CONVERTED = {
    "to", "type", "float", "double", "bfloat16", "half", "type_as", "_to_copy", "contiguous", "clone", "alias", "detach",
}  # fmt: skip

_OPERANDS = ("input", "self", "mat1", "weight", "mat2", "other", "vec")


class How(Enum):
    """How an operator uses a weight V of two dims."""

    TURNED = "V.t()"
    CONVERTED = "V in another dtype"
    LINEAR = "x V^T"
    TIMES = "x V"
    BEFORE = "V x"
    EINSUM = "an einsum over the columns of V"
    EINSUM_OVER_ROWS = "an einsum over the rows of V"
    LOOKED_UP = "rows of V"
    LIKE = "the dtype or shape of V"
    OTHER = "anything else"


class Reads(TorchFunctionMode):
    """While active, calls `read` instead of every operator that takes a known tensor.

    A mode, not a tensor subclass: the weights keep their own classes, fake or distributed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, tuple[Tensor, Any]] = {}  # by id; holding the tensor keeps its id from being reused

    def know(self, tensor: Tensor, what: Any) -> Tensor:
        """Watch operators on this tensor from now on, and pass `what` to `read`; return the tensor."""
        self._known[id(tensor)] = tensor, what
        return tensor

    def read(self, func: Callable[..., Any], how: How, args: Sequence[Any], kwargs: Mapping[str, Any], known: Any) -> Any:
        """Return the operator's result.

        Args:
            func: the operator.
            how: it uses the known tensor; `How.OTHER` if it takes several.
            args, kwargs: its arguments.
            known: the `what` of each known tensor, by its id.
        """
        raise NotImplementedError

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Called by torch with this mode disabled."""
        kwargs = kwargs or {}
        leaves = [leaf for leaf in tree.leaves_and_spec((list(args), dict(kwargs)))[0] if id(leaf) in self._known]
        if not leaves:
            return func(*args, **kwargs)
        known = {id(leaf): self._known[id(leaf)][1] for leaf in leaves}
        how = how_read(func, args, kwargs, leaves[0]) if len(leaves) == 1 else How.OTHER
        return self.read(func, how, args, kwargs, known)


def name_of(func: Callable[..., Any]) -> str:
    """Return `linear` for `functional.linear` and `aten.linear.default`; `T` for the getter of that attribute."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return str(getattr(getattr(func, "__self__", None), "__name__", ""))
    return str(name).partition(".")[0]


def operands(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return a product's operands in the order of its arguments, whether positional or by keyword."""
    given = [*args, *(kwargs[name] for name in _OPERANDS if name in kwargs)]
    in_list = len(given) > 1 and isinstance(given[0], str) and isinstance(given[1], (list, tuple))
    return [given[0], *given[1]] if in_list else given


def how_read(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], weight: Tensor) -> How:
    """Return how an operator uses one of its arguments, a tensor of two dims."""
    name, given = name_of(func), operands(args, kwargs)
    place = next((number for number, operand in enumerate(given) if operand is weight), None)
    if name in _TURNED:
        return How.TURNED
    if name in _TURNED_BY_DIMS:
        return How.TURNED if _swaps(name, args[1:], kwargs) else How.CONVERTED
    if name in _CONVERTED:
        return How.CONVERTED if place == 0 else How.LIKE
    if name == "linear" and place == 1:
        return How.LINEAR
    if name in ("matmul", "mm", "mv"):
        return How.BEFORE if place == 0 else How.TIMES
    if name == "addmm" and place in (1, 2):
        return How.BEFORE if place == 1 else How.TIMES
    if name == "einsum" and place is not None:
        return _einsum(given, place)
    if name.startswith("embedding"):
        return How.LOOKED_UP
    return How.OTHER


def _swaps(name: str, dims: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether the call swaps the two dims of a matrix."""
    given = [*dims, *kwargs.values()]
    first, second = given[0] if len(given) == 1 else given
    return (first % 2, second % 2) == (1, 0) if name == "permute" else first % 2 != second % 2


def _einsum(given: Sequence[Any], place: int) -> How:
    """Classify an einsum: a product if it takes two tensors and the one at `place` has two distinct letters."""
    if len(given) != 3 or not isinstance(given[0], str) or "->" not in given[0]:
        return How.OTHER
    terms, result = given[0].replace(" ", "").split("->")
    letters = terms.split(",")[place - 1]
    if not len(set(letters)) == len(letters) == 2:
        return How.OTHER
    return How.EINSUM_OVER_ROWS if letters[0] not in result else How.EINSUM
