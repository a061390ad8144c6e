"""The layers that hold each parameter, and the names they hold it under."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from autofunc import tree
from autofunc.errors import some_of


def holders(
    layers: Sequence[str], params: Sequence[Sequence[str]], aliases: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, str]]:
    """Return, by layer: canonical name of each parameter it uses -> the path under which it holds it.

    The first layer to use a parameter holds it by its canonical name. Other layers use an alias that the module has inside
    the layer, or else a name made of both.
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
    """Return the parameters that could be trained but no layer uses: their gradients are zero."""
    used = {name for names in params for name in names}
    return [
        name for name, leaf in parameters.items()
        if name not in used and leaf.requires_grad and tree.matches(name, trainable)
    ]  # fmt: skip


def with_idle(params: Sequence[Sequence[str]], unread: Sequence[str], order: Iterable[str]) -> list[list[str]]:
    """Return the parameters each layer holds: those it uses, and the idle ones that follow them in the module."""
    first = {name: layer for layer, names in reversed([*enumerate(params)]) for name in names}
    held, layer, waiting = [list(names) for names in params], 0, set(unread)
    for name in order:
        layer = first.get(name, layer)
        if name in waiting:
            held[layer].append(name)
    return held


def idle_note(unread: Sequence[str], entries: Iterable[str]) -> str:
    """Return the note for the user about parameters that no layer uses."""
    return f"no layer uses {some_of(unread, 5)} with these inputs ({', '.join(entries)}): the gradients are zero"
