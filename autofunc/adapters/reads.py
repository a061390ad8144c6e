"""Which operators read a weight, and how: what multiplies by it, what turns or converts it, and what else there is."""

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
    """What an operator does with a weight V of two dims."""

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
    """While it is in effect, `read` is asked in the place of every operator that is given a known tensor.

    A mode, not a subclass of tensors: the weights stay what they are, fake or distributed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, tuple[Tensor, Any]] = {}  # by id, with the tensor, so that no other takes its id

    def know(self, tensor: Tensor, what: Any) -> Tensor:
        """From now on, operators on this tensor are seen; `what` is handed to `read`."""
        self._known[id(tensor)] = tensor, what
        return tensor

    def read(self, func: Callable[..., Any], how: How, args: Sequence[Any], kwargs: Mapping[str, Any], known: Any) -> Any:
        """What the operator gives.

        Args:
            func: the operator.
            how: what it does with the known tensor; `How.OTHER` where it is given several.
            args, kwargs: its arguments.
            known: for each known tensor, by its id, what it was said to be.
        """
        raise NotImplementedError

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Called by torch, with the mode itself switched off."""
        kwargs = kwargs or {}
        leaves = [leaf for leaf in tree.leaves_and_spec((list(args), dict(kwargs)))[0] if id(leaf) in self._known]
        if not leaves:
            return func(*args, **kwargs)
        known = {id(leaf): self._known[id(leaf)][1] for leaf in leaves}
        how = how_read(func, args, kwargs, leaves[0]) if len(leaves) == 1 else How.OTHER
        return self.read(func, how, args, kwargs, known)


def name_of(func: Callable[..., Any]) -> str:
    """`linear` of `functional.linear` and of `aten.linear.default`; `T` of what reads the attribute."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return str(getattr(getattr(func, "__self__", None), "__name__", ""))
    return str(name).partition(".")[0]


def operands(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """What a product is of, in the order of its arguments, however they were given."""
    given = [*args, *(kwargs[name] for name in _OPERANDS if name in kwargs)]
    in_list = len(given) > 1 and isinstance(given[0], str) and isinstance(given[1], (list, tuple))
    return [given[0], *given[1]] if in_list else given


def how_read(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], weight: Tensor) -> How:
    """What an operator does with one of its arguments, a tensor of two dims."""
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
    """Whether the two dims of a matrix change places."""
    given = [*dims, *kwargs.values()]
    first, second = given[0] if len(given) == 1 else given
    return (first % 2, second % 2) == (1, 0) if name == "permute" else first % 2 != second % 2


def _einsum(given: Sequence[Any], place: int) -> How:
    """An einsum of two tensors, the one at this place with two letters; anything else is no product."""
    if len(given) != 3 or not isinstance(given[0], str) or "->" not in given[0]:
        return How.OTHER
    terms, result = given[0].replace(" ", "").split("->")
    letters = terms.split(",")[place - 1]
    if not len(set(letters)) == len(letters) == 2:
        return How.OTHER
    return How.EINSUM_OVER_ROWS if letters[0] not in result else How.EINSUM
