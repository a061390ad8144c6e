"""Evaluation of a module in train mode: parts whose forward draws random numbers are put in eval mode.

Dropout is off without a key anyway. But only a part itself knows what it draws in training only, such as stochastic depth.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import fx, nn

from autofunc.captured.draws import draw
from autofunc.captured.flow import Flow

_WHERE = 4  # the position of `where` among the arguments of `draw`


def drawing_parts(flow: Flow) -> frozenset[str]:
    """Return the names of the innermost modules whose draws affect what the forward returns; "" is the outermost."""
    stacks = (node.meta["modules"] for node in _draws(flow))
    return frozenset(stack[-1][1] if stack else "" for stack in stacks)


@dataclass(frozen=True)
class Evaluation:
    """How a forward runs without a key."""

    parts: frozenset[str]  # names of parts in eval mode, though the module trains
    drawn: str  # what it draws even then, which takes a key; "" if nothing


def evaluation_of(flow: Flow) -> Evaluation:
    """Return how a forward that was captured without a key runs."""
    return Evaluation(flow.exported.evaluated, next((str(node.args[_WHERE]) for node in _draws(flow)), ""))


def _draws(flow: Flow) -> list[fx.Node]:
    return [node for node in flow.nodes if node.target is draw and node in flow.alive]


def with_eval_mode(module: nn.Module, modes: Mapping[nn.Module, bool], parts: Iterable[str]) -> dict[nn.Module, bool]:
    """Return the modes of all parts, with some in eval mode: only these, not the parts inside them.

    Args:
        module: the outermost module.
        modes: by part, whether it is in train mode.
        parts: names of those to put in eval mode.
    """
    still = {module.get_submodule(name) for name in parts}
    return {part: trains and part not in still for part, trains in modes.items()}
