"""The places where a captured forward can be cut, and its default layers."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx, nn

from autofunc.captured.flow import Flow
from autofunc.model import CutPoints

Node = fx.Node

ABSENT = ("needs no weights, so each stage computes it itself", "is not run")
"""Why a name is not a layer, though for other batches it may be one."""

FIRST = "input"
"""The name of what comes before the first named place."""


def find_cut_points(flow: Flow, modules: Iterable[str]) -> CutPoints:
    """Find all named modules and markers, separated by whether a cut before them is legal.

    Args:
        flow: of the captured forward.
        modules: names of all submodules. One that is not run itself, but holds a single part, begins where that part does.
    """
    modules, held = list(modules), dict[str, list[str]]()
    for name in modules:
        held.setdefault(name.rpartition(".")[0], []).append(name)
    starts: dict[str, int] = {}
    runs: dict[str, dict[str, int]] = {}  # name -> key of each call -> its position
    seen: set[str] = set()
    for position, node in enumerate(flow.nodes):
        for key, name in node.meta.get("modules", ()):
            seen.add(name)
            if node in flow.weighted and node in flow.alive:
                runs.setdefault(name, {}).setdefault(key, position)
    for name in sorted(modules, key=lambda name: -name.count(".")):  # innermost first
        inside = held.get(name, [])
        if name not in seen and len(inside) == 1 and inside[0] in runs:
            runs[name] = runs[inside[0]]
    for name, calls in runs.items():
        if len(calls) == 1:
            starts[name] = next(iter(calls.values()))
        else:  # `layers@2` is its second run
            starts.update({f"{name}@{number}": position for number, position in enumerate(sorted(calls.values()), start=1)})
    for name, node in flow.exported.markers.items():
        later = (position for position in range(flow.position.get(node, len(flow.nodes)), len(flow.nodes)))
        start = next((p for p in later if flow.nodes[p] in flow.weighted and flow.nodes[p] in flow.alive), None)
        if start is not None:
            starts[name] = start
    refused: dict[str, str] = {}
    for name in modules:
        if name and name not in runs and name not in starts:
            refused[name] = ABSENT[0] if name in seen else ABSENT[1]
        elif len(runs.get(name, {})) > 1:
            count = len(runs[name])
            refused[name] = f"runs {count} times, so its name is ambiguous; its runs are {name}@1 to {name}@{count}"
    for name, start in starts.items():
        if any(first < start <= last for first, last in flow.uncuttable):
            refused[name] = "begins between two writes to the same memory"
    legal = sorted((start, name) for name, start in starts.items() if name not in refused)
    return CutPoints({name: start for start, name in legal}, refused)


def default_layers(module: nn.Module | None, places: CutPoints, markers: Iterable[str]) -> list[str]:
    """Return the names at which layers begin by default.

    Markers, if there are any. Otherwise the items of the outermost lists of modules, and the modules next to those lists
    that hold no list: in a transformer the embeddings, each block, the last norm and the head.
    """
    named = [name for name in markers if name in places.start]
    found = named or ([*_outermost(module, "")] if module is not None else [])
    return sorted((name for name in dict.fromkeys(found) if name in places.start), key=places.start.__getitem__)


def _outermost(module: nn.Module, prefix: str) -> Iterable[str]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(module, (nn.ModuleList, nn.Sequential)) or not _holds_list(child):
            yield path
        else:
            yield from _outermost(child, path + ".")


def _holds_list(module: nn.Module) -> bool:
    return any(isinstance(part, (nn.ModuleList, nn.Sequential)) for part in module.modules())
