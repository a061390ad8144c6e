"""What parameters are called where an adapter is used: as transformers calls them, or as they are here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from autofunc.model import Model


def names_in_transformers(base: Model, paths: Sequence[str]) -> Mapping[str, str]:
    """The names of some parameters in the model of transformers that a model of named layers says it is.

    Those that are joined or turned there have none: a parameter is found by being the same tensor.

    Args:
        base: the model without adapters.
        paths: of parameters as layers see them.
    """
    if base.in_transformers is None:
        return {}
    given = {path: torch.empty_like(leaf) for path, leaf in base.spec.items() if base.canonical(path) == path}
    names: dict[int, list[str]] = {}
    for name, leaf in base.in_transformers(given)[1].items():
        names.setdefault(id(leaf), []).append(name)
    found = {}
    for path in paths:
        same = names.get(id(given[base.canonical(path)]), [])
        # of tied ones, each has a name of its own
        own = [name for name in same if name == path or name.endswith(f".{path}")]
        if own:
            found[path] = own[0]
        elif len(same) == 1:
            found[path] = same[0]
    return found


def names_outside(base: Model, paths: Sequence[str]) -> Mapping[str, str]:
    """The names by which PEFT finds these parameters: transformers' where all of them have one, else their own."""
    found = names_in_transformers(base, paths)
    return found if len(found) == len(paths) else {path: path for path in paths}
