"""Trained parameters and state as a safetensors file: one entry per canonical path, the same for every layout."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from autofunc import tree
from autofunc.adapters import AdaptedModel, save_adapter
from autofunc.errors import PipelineRunError
from autofunc.model import Model
from autofunc.train.output import ADAPTER, WEIGHTS


def save_weights(params: tree.Nested, path: Path, state: tree.Nested | None = None) -> None:
    """Write full trees of parameters, and of the state that layers carry from step to step; their paths differ."""
    leaves = {**tree.flatten(params), **({} if state is None else tree.flatten(state))}
    save_file({name: leaf.detach().contiguous().cpu() for name, leaf in leaves.items()}, path)


def save_safely(write: Callable[[Path], object], path: Path) -> None:
    """Write expensive results: into a new temporary folder if `path` cannot be written.

    Args:
        write: writes a file or folder to a path.
        path: where to write.

    Raises:
        PipelineRunError: if it cannot be written to `path`; names the temporary file if that worked.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    except (OSError, SafetensorError) as error:
        elsewhere = Path(tempfile.mkdtemp(prefix="autofunc-")) / path.name
        try:
            write(elsewhere)
        except (OSError, SafetensorError) as again:
            raise PipelineRunError(
                f"the weights cannot be written to {path} ({error}), nor to {elsewhere} ({again})"
            ) from error
        raise PipelineRunError(f"the weights cannot be written to {path}: {error}. They are in {elsewhere}") from error


def save_result(
    model: Model, params: tree.Nested, state: tree.Nested, folder: Path, named: Callable[[str], str] = str
) -> list[str]:
    """Write a run's trained weights or adapter; return the names of the files.

    Args:
        model: the trained model.
        params: `written_part`, gathered.
        state: the state that layers carry, gathered. Adapters cannot hold it, so a file of weights does.
        folder: the run's folder.
        named: maps a file's default name to its name.
    """
    weights, adapter = named(WEIGHTS), named(ADAPTER)
    if not isinstance(model, AdaptedModel):
        save_safely(lambda path: save_weights(params, path, state), folder / weights)
        return [weights]
    save_safely(lambda path: save_adapter(model, params, path), folder / adapter)
    if not tree.flatten(state):
        return [adapter]
    save_safely(lambda path: save_weights(params, path, state), folder / weights)
    return [adapter, weights]


def written_part(model: Model, params: tree.Nested) -> tree.Nested:
    """Return the parameters of this rank that are written: all, or only the adapter's if no file of weights is written."""
    if not isinstance(model, AdaptedModel) or model.state_spec:
        return params
    return tree.to_tensordict({path: leaf for path, leaf in tree.flatten(params).items() if model.is_trainable(path)})
