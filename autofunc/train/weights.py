"""Trained parameters as a safetensors file: one entry per canonical path, the same for every layout."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from autofunc import tree


def save_weights(params: tree.Nested, path: Path) -> None:
    """Write a full tree of parameters."""
    save_file({name: leaf.detach().contiguous().cpu() for name, leaf in tree.flatten(params).items()}, path)
