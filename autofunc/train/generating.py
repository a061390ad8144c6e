"""One process of `autofunc generate -c`: texts from a run's model and weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh

from autofunc.checkpoint.write import is_first, of_first
from autofunc.config import FinetuneConfig
from autofunc.data import TextTokenizer
from autofunc.errors import AutofuncError, ConfigError
from autofunc.generation import Sampling, check_request, generate
from autofunc.progress_bar import counting, note
from autofunc.train.evaluate import weights_of
from autofunc.train.loop import build_pipe
from autofunc.train.recipe import Recipe
from autofunc.train.resume import source
from autofunc.train.texts import TextsWanted, encoded, named_tokenizer, put_together, show
from autofunc.train.tokenizers import tokenizer_in
from autofunc.train.watched import watched


def check_texts(recipe: Recipe, wanted: TextsWanted) -> None:
    """Refuse requests that cannot be met, before processes start.

    Raises:
        ConfigError: naming the option.
    """
    axes = recipe.axes
    others = [f"--{name}_size 1" for name in ("dp", "cp", "tp") if getattr(axes, name) > 1]
    if others:
        raise ConfigError(f"generate runs on pp ranks only, and this run has {axes}: give {' '.join(others)}")
    try:
        Sampling(**wanted.sampling)
        rows = encoded(tokenizer_of(recipe, wanted.tokenizer).encode, wanted.prompts)
        check_request(recipe.model, rows, wanted.max_new_tokens)
    except ConfigError:
        raise
    except AutofuncError as error:
        raise ConfigError(f"generate: {error}") from error


def generate_texts(
    recipe: Recipe, mesh: DeviceMesh | None, device: torch.device, output_dir: Path, config: FinetuneConfig,
    wanted: TextsWanted,
) -> None:  # fmt: skip
    """Generate with a checkpoint or the configured weights; the first rank shows the texts.

    Args:
        recipe: of the run.
        mesh: this process's mesh; None runs every pp rank in this process.
        device: where parameters live.
        output_dir: of the run, for its checkpoints.
        config: for the checkpoint, and the timeouts.
        wanted: the prompts, and how to choose tokens.
    """
    path = of_first(source(config.checkpoint, output_dir, writes=False))
    if path is None and config.weights is None:
        note("using the initial weights; to use trained ones: --checkpoint.restore_from LATEST, --weights FOLDER")
    tokenizer = tokenizer_of(recipe, wanted.tokenizer)
    rows = encoded(tokenizer.encode, wanted.prompts)
    with watched(config.distributed), counting("generating", "tokens", wanted.max_new_tokens) as advance:
        pipe = build_pipe(recipe, mesh)
        params, state = weights_of(path, recipe, pipe, device)
        made = generate(
            pipe, params, rows, max_new_tokens=wanted.max_new_tokens, state=state, tell=note,
            on_step=lambda _: advance(1), **wanted.sampling,
        )  # fmt: skip
    if is_first():
        show(put_together(tokenizer, wanted.prompts, rows, made), as_json=wanted.as_json)


def tokenizer_of(recipe: Recipe, named: str | None) -> TextTokenizer:
    """Return the named tokenizer, else the dataset's.

    Raises:
        ConfigError: if there is neither.
    """
    if named is not None:
        return named_tokenizer(named)
    tokenizer = tokenizer_in(recipe.dataset)
    if tokenizer is not None:
        return tokenizer
    raise ConfigError(
        f"generate needs a tokenizer, and the dataset ({type(recipe.dataset).__name__}) has no attribute "
        "tokenizer: give --tokenizer FOLDER, a name on the hub, or --tokenizer bytes"
    )
