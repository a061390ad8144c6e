"""The registered names of the parts that ran.

If a part has two names, `torch.export` records every access instead of looking names up: a part reached through a slice
of a list is then called `layers.slice(None, 4, None).0`, and one reached through a wrapper's `__getattr__` lacks a
component of its name.
"""

from __future__ import annotations

import re
from collections import OrderedDict

from torch import nn

_PIECES = re.compile(r"slice\([^)]*\)|[^.]+")


class RegisteredNames:
    """Maps the paths of a capture to names in the module.

    Args:
        module: the captured module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._known: dict[str, str | None] = {}
        self._first: dict[int, str] = {}
        for name, part in module.named_modules(remove_duplicate=False):
            self._known[name] = name
            self._first.setdefault(id(part), name)

    def of(self, path: str) -> str | None:
        """Return the name of the part at a path; None if it is not registered, like a slice itself."""
        if path not in self._known:
            self._known[path] = self._first.get(id(self._part(path)))
        return self._known[path]

    def _part(self, path: str) -> object:
        part: object = self._module
        for piece in _PIECES.findall(path):
            if piece.startswith("slice("):
                bounds = (None if bound == "None" else int(bound) for bound in piece[6:-1].split(", "))
                part = _sliced(part, slice(*bounds))
            else:
                part = getattr(part, piece, None)
        return part


def _sliced(part: object, bounds: slice) -> object:
    """Slice as torch does: a list's slice is renumbered, a sequence's keeps its names."""
    if isinstance(part, nn.Sequential):
        return nn.Sequential(OrderedDict(list(part.named_children())[bounds]))
    return nn.ModuleList(list(part._modules.values())[bounds]) if isinstance(part, nn.ModuleList) else None
