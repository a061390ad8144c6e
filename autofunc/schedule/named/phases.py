"""Shared by several schedules: the order of microbatches, the phases of 1F1B, and delayed weight gradients."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from autofunc.schedule.ir import Kind, Table, compute_table

Columns = npt.NDArray[np.int64]
"""int64 array of shape (number of actions, 2): stage, microbatch."""


def one_stage(stage: int, num_microbatches: int) -> Columns:
    """All microbatches of one stage, in order."""
    return np.stack((np.full(num_microbatches, stage), np.arange(num_microbatches)), axis=-1)


def in_rounds(stages: npt.NDArray[np.int64], num_ranks: int, num_microbatches: int) -> tuple[Columns, int]:
    """Microbatches in rounds of at least `num_ranks`, each through all stages before the next; and the longest round.

    The rounds are as even as possible, larger ones first, so that any number of microbatches works.
    """
    rounds = np.array_split(np.arange(num_microbatches), max(1, num_microbatches // num_ranks))
    parts = [np.stack((np.full(len(each), stage), each), axis=-1) for each in rounds for stage in stages]
    return np.concatenate(parts), len(rounds[0])


def alternate(forwards: Columns, backwards: Columns, warmup: int) -> Table:
    """Run `warmup` forwards, then alternate forwards and backwards, then run the remaining backwards.

    Args:
        forwards: in order.
        backwards: in order, as many as forwards.
        warmup: cut to the number of forwards.
    """
    warmup = min(warmup, len(forwards))
    steady = len(forwards) - warmup
    pairs = np.stack((forwards[warmup:], backwards[:steady]), axis=1).reshape(-1, 2)
    columns = np.concatenate((forwards[:warmup], pairs, backwards[steady:]))
    kind = np.concatenate((np.full(warmup, Kind.F), np.tile((Kind.F, Kind.B), steady), np.full(warmup, Kind.B)))
    return compute_table(columns[:, 0], kind, columns[:, 1])


def delayed_weight_row(forwards: Columns, backwards: Columns, warmup: int, delay: int) -> Table:
    """Run `warmup` forwards; then repeat F, `I` and the W that is `delay` backwards behind; then the remaining W.

    1F1B on the input gradients, with the weight gradients some way behind. Source: Qi et al., "Zero Bubble Pipeline
    Parallelism", ICLR 2024, section 2.1 (arXiv 2401.10241).

    A rank holds `warmup + 1 + delay` activations at most: what an early rank holds for its warmup, a late one may hold for
    its delayed W, which fill the bubble at the end.

    Args:
        forwards: (stage, microbatch) in order.
        backwards: in order, as many as forwards.
        warmup: cut to the number of forwards.
        delay: by how many backwards W follows `I`.
    """
    count = len(forwards)
    number = np.arange(count)
    # the slot of each action: pairs F, I in steps of three, with the delayed W in between
    slots = np.concatenate((3 * (number - min(warmup, count)), 3 * number + 1, 3 * (number + delay) + 2))
    order = np.argsort(slots, kind="stable")
    columns = np.concatenate((forwards, backwards, backwards))[order]
    return compute_table(columns[:, 0], np.repeat((Kind.F, Kind.I, Kind.W), count)[order], columns[:, 1])
