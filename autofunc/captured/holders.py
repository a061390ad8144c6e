"""Which layer holds which parameter, and under what name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from autofunc import tree
from autofunc.errors import some_of


def holders(
    layers: Sequence[str], params: Sequence[Sequence[str]], aliases: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, str]]:
    """By layer: canonical name of each parameter it uses -> the path under which it holds it.

    The first layer to use a parameter holds it by its name; the others by another name that the module has for it, or one
    made of both.
    """
    found: dict[str, dict[str, str]] = {}
    taken: set[str] = set()
    for layer, names in zip(layers, params, strict=True):
        found[layer] = {}
        for name in names:
            own = [alias for alias in aliases.get(name, ()) if alias.startswith(layer + ".") and alias not in taken]
            path = name if name not in taken else own[0] if own else f"{name}@{layer}"
            taken.add(path)
            found[layer][name] = path
    return found


def idle(parameters: Mapping[str, Tensor], params: Sequence[Sequence[str]], trainable: Sequence[str]) -> list[str]:
    """What could be trained, and no layer uses: its gradients are zero."""
    used = {name for names in params for name in names}
    return [
        name for name, leaf in parameters.items()
        if name not in used and leaf.requires_grad and tree.matches(name, trainable)
    ]  # fmt: skip


def with_idle(params: Sequence[Sequence[str]], unread: Sequence[str], order: Iterable[str]) -> list[list[str]]:
    """What each layer holds: what it uses, and what is idle and comes next in the module."""
    first = {name: layer for layer, names in reversed([*enumerate(params)]) for name in names}
    held, layer, waiting = [list(names) for names in params], 0, set(unread)
    for name in order:
        layer = first.get(name, layer)
        if name in waiting:
            held[layer].append(name)
    return held


def idle_note(unread: Sequence[str], entries: Iterable[str]) -> str:
    """What is said of parameters that no layer uses."""
    return f"no layer uses {some_of(unread, 5)} with these inputs ({', '.join(entries)}): the gradients are zero"
