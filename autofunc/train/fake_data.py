"""A configuration with made-up data, so that a run can be planned on a machine without its data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autofunc.config import FinetuneConfig, refusing_exit
from autofunc.config.environment import read_environment
from autofunc.train.model import SEED, make

_LENGTHS = ("seq_len", "seq_length", "max_length", "max_seq_len", "max_seq_length", "block_size")
"""Names that datasets use for the number of tokens in a row."""
_MOST_TOKENS = ("n_positions", "max_position_embeddings", "max_seq_len", "block_size", "n_ctx")
"""Names that model configs use for the maximum number of tokens in a row."""
_SOME_TOKENS, _SOME_IDS = 1024, 2


@refusing_exit()
def with_fake_data(config: FinetuneConfig, notes: list[str]) -> FinetuneConfig:
    """Return the configuration with its datasets replaced by made-up token ids; no dataset is read.

    Args:
        config: its model is built without weights, to learn its vocabulary size and maximum row length.
        notes: gains the assumptions.
    """
    known = _sizes(config)
    seq_len, of_length = _first(read_environment(config.dataset), _LENGTHS, "dataset")
    if seq_len is None:
        seq_len, of_length = _first(known, _MOST_TOKENS, "the model's")
        if seq_len is None or seq_len > _SOME_TOKENS:
            seq_len, of_length = _SOME_TOKENS, "assumed; dataset.seq_len sets it"
    vocab_size, of_ids = _first(known, ("vocab_size",), "the model's")
    if vocab_size is None:
        vocab_size, of_ids = _SOME_IDS, "the model does not tell its vocab_size"
    notes.append(
        f"fake data: no dataset is read; rows are input_ids and labels of {seq_len} tokens ({of_length}), with ids below "
        f"{vocab_size} ({of_ids})"
    )
    steps = config.step_scheduler
    section = {
        "_target_": "autofunc.data.MadeUpTokens", "vocab_size": vocab_size, "seq_len": seq_len,
        "num_rows": steps.global_batch_size * (steps.max_steps or 1),
    }  # fmt: skip
    return config.model_copy(update={"dataset": section, **dict.fromkeys(config.validations, section)})


def _sizes(config: FinetuneConfig) -> Mapping[str, Any]:
    """Return the values in the model's config, and the arguments the model is built with."""
    made = make(config.model_copy(update={"weights": config.weights or SEED}))
    found = getattr(getattr(made, "module", made), "config", None)
    names = ("vocab_size", *_MOST_TOKENS)
    own = {
        name: found[name] if isinstance(found, Mapping) and name in found else getattr(found, name, None) for name in names
    }
    return {**read_environment(config.model), **{name: size for name, size in own.items() if size is not None}}


def _first(sizes: Mapping[str, Any], names: tuple[str, ...], whose: str) -> tuple[int | None, str]:
    """Return the first of these names that holds a size, and that name."""
    for name in names:
        size = sizes.get(name)
        if isinstance(size, int) and not isinstance(size, bool) and size > 0:
            return size, f"{whose} {name}"
    return None, ""
