"""The connections over which ranks exchange values, and the GPU memory they take."""

from __future__ import annotations

from autofunc.runtime.pair_groups import Transfers
from autofunc.runtime.program import channels_between, message_layouts
from autofunc.runtime.ties import find_ties
from autofunc.shown import size_in_words
from autofunc.splitting import Boundaries
from autofunc.train.recipe import Recipe

_CHANNELS, _BUFFER_BYTES = 32, 4 << 20
"""NCCL's default limit of channels per communicator, and its default buffer per channel."""


def count_connections(recipe: Recipe, boundaries: Boundaries) -> tuple[int, ...]:
    """Count connections by pp rank: one per direction and peer, for training steps."""
    schedule = recipe.schedule
    layouts = {path: (tuple(leaf.shape), leaf.dtype) for path, leaf in recipe.model.spec.items()}
    found = {
        *channels_between(schedule, message_layouts(schedule, boundaries)),
        *(channel for tie in find_ties(recipe.stages, schedule, layouts) for channel in tie.channels()),
    }
    return tuple(sum(rank in channel for channel in found) for rank in range(schedule.num_ranks))


def most_bytes(connections: int, transfers: Transfers) -> int:
    """Return an upper bound on the bytes of NCCL's communicators on a GPU, for its default buffers."""
    return connections * (transfers.max_ctas or _CHANNELS) * _BUFFER_BYTES


def assumed(transfers: Transfers) -> str:
    """Describe the assumptions of `most_bytes`."""
    channels = (
        f"{_CHANNELS} channels (NCCL's limit; lower it by transfers.max_ctas)"
        if transfers.max_ctas is None
        else f"{transfers.max_ctas} channels (transfers.max_ctas)"
    )
    return f"assuming a buffer of {size_in_words(_BUFFER_BYTES)} (NCCL_BUFFSIZE) for each of {channels}"
