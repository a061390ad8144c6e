"""The names of parameters in adapter files: transformers' names, or the model's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from autofunc.model import Model


def names_in_transformers(base: Model, paths: Sequence[str]) -> Mapping[str, str]:
    """Return parameters' names in the transformers model that corresponds to a model of named layers.

    Parameters are matched by tensor identity, so those that transformers fuses or transposes have no name.

    Args:
        base: the model without adapters.
        paths: holders of parameters.
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
        # tied parameters share a tensor, but each has its own name
        own = [name for name in same if name == path or name.endswith(f".{path}")]
        if own:
            found[path] = own[0]
        elif len(same) == 1:
            found[path] = same[0]
    return found


def names_outside(base: Model, paths: Sequence[str]) -> Mapping[str, str]:
    """Return the names by which PEFT finds these parameters: transformers' if all of them have one, else their own."""
    found = names_in_transformers(base, paths)
    return found if len(found) == len(paths) else {path: path for path in paths}
