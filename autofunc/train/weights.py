"""Trained parameters and state as a safetensors file: one entry per canonical path, the same for every layout."""

from __future__ import annotations

import tempfile
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from autofunc import tree
from autofunc.errors import PipelineRunError


def save_weights(params: tree.Nested, path: Path, state: tree.Nested | None = None) -> None:
    """Write full trees of parameters, and of what layers keep from step to step; their paths differ."""
    leaves = {**tree.flatten(params), **({} if state is None else tree.flatten(state))}
    save_file({name: leaf.detach().contiguous().cpu() for name, leaf in leaves.items()}, path)


def save_safely(params: tree.Nested, path: Path, state: tree.Nested) -> None:
    """Write weights that took long to make: into a new folder for temporary files where `path` cannot be written.

    Raises:
        PipelineRunError: when they can be written nowhere, or elsewhere only: then naming the file.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_weights(params, path, state)
    except (OSError, SafetensorError) as error:
        elsewhere = Path(tempfile.mkdtemp(prefix="autofunc-")) / path.name
        try:
            save_weights(params, elsewhere, state)
        except (OSError, SafetensorError) as again:
            raise PipelineRunError(
                f"the weights cannot be written to {path} ({error}), nor to {elsewhere} ({again})"
            ) from error
        raise PipelineRunError(f"the weights cannot be written to {path}: {error}. They are in {elsewhere}") from error
