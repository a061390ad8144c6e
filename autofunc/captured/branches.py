"""Capture of a forward that decides by data: it goes as on the example batch, with checks that stop a batch that differs.

While it is exported, each value it reads from a tensor is the one read on the example, and a check, `autofunc::decided`,
is left in the graph. Values that depend on constants alone need no check. A float from data is not a decision, since it
differs from batch to batch: it stays a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from autofunc.captured.all_places import ROWS_OF_DATA
from autofunc.captured.chosen_rows import ChosenRows
from autofunc.captured.conversions import Conversions, Decision, Kind, Place, here, reads_values
from autofunc.captured.flow import Flow
from autofunc.decisions import decided
from autofunc.errors import ModelError
from autofunc.graph.lines import first_lines

DECIDES = "forward decides by data, as on the example batch; a batch that decides differently stops the step"
"""A note for the user, followed by the lines."""


class Noticing(TorchFunctionMode):
    """Changes nothing; notes whether any value is read."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.seen = self.seen or reads_values(func, args, kwargs)
        return func(*args, **kwargs)


class Replaying(Conversions):
    """Returns the values that were read on the example batch, and leaves checks in the graph.

    Args:
        what: a name of the captured forward, for messages.
        decisions: those of the example, in order.
        all_places: choose all places of masks, except where every row of a batch had equally many true.
        shortened: skip the first and last runs of loops over places.
    """

    def __init__(
        self, what: str, decisions: Sequence[Decision], *, all_places: bool = False, shortened: bool = False
    ) -> None:
        super().__init__()
        self._rows = ChosenRows(self._uses_rows, shortened=shortened) if all_places else None
        self._even = even_places(decisions)
        self._what = what
        self._left: dict[Place, list[Decision]] = {}
        for decision in decisions:
            self._left.setdefault(decision.place, []).append(decision)
        self._visited: set[Place] = set()
        self._failure: ModelError | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        run = partial(super().__torch_function__, func, types, args, kwargs)
        return run() if self._rows is None else self._rows.called(func, args, kwargs, run)

    def value(self, kind: Kind, found: Tensor) -> Any:
        """See `Conversions.value`."""
        known = None if self._rows is None else self._rows.value(found)
        if known is not None:
            return known
        place = here()
        value = self._next(place, kind)
        decided(found, kind, 0 if kind == "float" else int(value), place.line)
        return value

    def places(self, mask: Tensor) -> tuple[Tensor, ...]:
        """See `Conversions.places`. Where all rows have equally many, so have other numbers of rows."""
        place, rows = here(), mask.shape[0]
        if self._rows is not None and place not in self._even:
            return tuple(self._rows.places(mask, place.line))
        counts = self._next(place, "rows")
        even = len(set(counts)) == 1
        if not even and len(counts) != rows:
            raise self._refused(ROWS_OF_DATA.format(what=self._what, maker="a mask", line=place.line))
        count = counts[0] * rows if even else sum(counts)
        decided(mask, "count" if even else "uneven", count, place.line)
        return torch.nonzero_static(mask, size=count).unbind(1)

    def _next(self, place: Place, kind: Kind) -> Any:
        self._visited.add(place)
        left = self._left.get(place)
        if not left or left[0].kind != kind:
            raise self._differs(place, "more values, or values of another kind,")
        return left.pop(0).value

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        super().__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]
        left = next((place for place in self._visited if self._left.get(place)), None)
        if left is not None and error is None:
            self._differs(left, "fewer values")
        if self._failure is not None:  # forward may have caught it
            raise self._failure

    def _differs(self, place: Place, how: str) -> ModelError:
        return self._refused(
            f"{self._what} decides by data, and with these shapes reads {how} than on the example batch ({place.line}), so "
            "its path is unknown; keep the value a tensor: no .item(), no 'if' on a tensor"
        )

    def _uses_rows(self, how: str) -> ModelError:
        line = here().line
        return self._refused(f"{ROWS_OF_DATA.format(what=self._what, maker='a mask', line=line)}; it {how}")

    def _refused(self, message: str) -> ModelError:
        self._failure = self._failure or ModelError(message)
        return self._failure


def chooses_rows(decisions: Sequence[Decision]) -> bool:
    """True if masks choose rows, and not equally many of each row of a batch."""
    return any(each.kind == "rows" and each.place not in even_places(decisions) for each in decisions)


def even_places(decisions: Sequence[Decision]) -> set[Place]:
    """Return the places whose masks are always true equally often, and at least once, in each of several rows."""
    found = {each.place for each in decisions if each.kind == "rows"}
    return found.difference(each.place for each in decisions if each.kind == "rows" and not _is_even(each))


def _is_even(decision: Decision) -> bool:
    counts = decision.value
    return decision.dims > 1 and len(counts) > 1 and len(set(counts)) == 1 and counts[0] > 0


def settle(flow: Flow, what: str) -> Flow:
    """Erase the checks that cannot fail: of what constants alone decide, or of what was checked before.

    Raises:
        ModelError: for a plain float made from data, or a mask of data that is true more often in some rows than in others.
    """
    exported = flow.exported
    fixed = {*exported.buffers, *exported.constants}.difference(exported.states)
    known: set[tuple[Any, ...]] = set()
    for check in flow.checks:
        found, kind, value, line = check.args
        given = [node for node in flow.closure([check]) if node.op == "placeholder"]
        read = _undetached(found)
        key = (read, kind, value)
        if all(node in fixed and not flow.writes_to(node) for node in given) or key in known:
            exported.graph.erase_node(check)
        elif kind == "float":
            raise ModelError(
                f"{what} makes a plain float from data ({line}), which differs in every batch; use the tensor itself, or "
                "its .item() in operators and comparisons"
            )
        elif kind == "uneven":
            raise ModelError(ROWS_OF_DATA.format(what=what, maker="a mask", line=line))
        elif not flow.writes_to(read):
            known.add(key)
    settled = Flow(exported, what)
    if settled.checks:
        exported.notes.append(f"{DECIDES}: {first_lines(str(check.args[3]) for check in settled.checks)}")
    return settled


def _undetached(node: Any) -> Any:
    while node.target is torch.ops.aten.detach.default:
        node = node.args[0]
    return node
