"""Trained parameters and state as a safetensors file: one entry per canonical path, the same for every layout."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from autofunc import tree


def save_weights(params: tree.Nested, path: Path, state: tree.Nested | None = None) -> None:
    """Write full trees of parameters, and of what layers keep from step to step; their paths differ."""
    leaves = {**tree.flatten(params), **({} if state is None else tree.flatten(state))}
    save_file({name: leaf.detach().contiguous().cpu() for name, leaf in leaves.items()}, path)
