"""`autofunc generate --model FOLDER`: generate text with a transformers model, from its folder alone."""

from __future__ import annotations

from typing import Any

import torch

import autofunc as af
from autofunc.automodel import AutoModel
from autofunc.data import TextTokenizer, load_tokenizer
from autofunc.errors import ConfigError, DataError
from autofunc.generation import Sampling
from autofunc.progress_bar import CONSOLE, counting, note
from autofunc.shown import literal, shown
from autofunc.train.device import take_device
from autofunc.train.texts import TextsWanted, encoded, named_tokenizer, put_together, show

_GIVE = "Give --tokenizer FOLDER, a name on the hub, or --tokenizer bytes for a model of bytes"


def generate_from_folder(folder: str, num_ranks: int, wanted: TextsWanted) -> None:
    """Generate in this process, which runs all pp ranks.

    Args:
        folder: with config.json, safetensors files and a tokenizer; or the name of a model on the hub.
        num_ranks: pp ranks.
        wanted: the prompts, and how tokens are chosen.

    Raises:
        AutofuncError: if the folder has no model, or generation fails.
    """
    Sampling(**wanted.sampling)
    with CONSOLE.status(literal(f"reading {shown(folder)}")):
        classes: Any = AutoModel  # mypy takes the class for a function, since it is never instantiated
        pretrained = classes.from_pretrained(folder)
        tokenizer = _tokenizer(folder, wanted.tokenizer)
        rows = encoded(tokenizer.prompt, wanted.prompts)
        model = af.from_module(pretrained, {"input_ids": torch.zeros((1, 8), dtype=torch.long)})
        schedule = af.schedule.build("gpipe", num_ranks=num_ranks, num_microbatches=num_ranks)
        pipe = af.pipeline(af.split(model, num_ranks), schedule)
        params = pipe.init(device=take_device(None))
    with counting("generating", "tokens", wanted.max_new_tokens) as advance:
        made = af.generate(
            pipe, params, rows, max_new_tokens=wanted.max_new_tokens, tell=note, on_step=lambda _: advance(1),
            **wanted.sampling,
        )  # fmt: skip
    show(put_together(tokenizer, wanted.prompts, rows, made), as_json=wanted.as_json)


def _tokenizer(folder: str, named: str | None) -> TextTokenizer:
    if named is not None:
        return named_tokenizer(named)
    try:
        tokenizer = load_tokenizer(folder)
    except DataError as error:
        raise ConfigError(f"--model: {error.args[0].partition('. ')[0]}. {_GIVE}") from error
    if not tokenizer.encode("text"):  # without files, transformers makes a tokenizer with an empty vocabulary
        raise ConfigError(f"--model: {shown(folder)} has no tokenizer. {_GIVE}")
    return tokenizer
