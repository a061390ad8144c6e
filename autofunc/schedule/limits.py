"""Size limits for schedules from outside, checked before anything of the claimed size is allocated."""

from __future__ import annotations

from autofunc.errors import ScheduleError

MOST_RANKS = 10_000
MOST_STAGES = 100_000
MOST_MICROBATCHES = 1_000_000
MOST_NAME = 200
"""Most characters in a schedule's name."""


def check_action(stage: int, microbatch: int, peer: int) -> None:
    """Refuse an action whose numbers are beyond the limits; pass -1 for a number it does not have.

    Raises:
        ScheduleError: naming the number.
    """
    if stage >= MOST_STAGES or peer >= MOST_STAGES:
        raise ScheduleError(f"stage {max(stage, peer)}, but a schedule has at most {MOST_STAGES:,}, numbered from 0")
    if microbatch >= MOST_MICROBATCHES:
        raise ScheduleError(f"microbatch {microbatch}, but a schedule has at most {MOST_MICROBATCHES:,}, numbered from 0")


def check_sizes(num_ranks: int, num_stages: int, num_microbatches: int, num_actions: int, claim: str = "it") -> None:
    """Refuse sizes beyond the limits, or that need more forwards than there are actions.

    Args:
        num_ranks: number of ranks found.
        num_stages: number of stages found or claimed.
        num_microbatches: number of microbatches found or claimed.
        num_actions: number of actions found.
        claim: what makes the claim, for the message.

    Raises:
        ScheduleError: naming the sizes.
    """
    for what, number, most in (
        ("rank", num_ranks, MOST_RANKS), ("stage", num_stages, MOST_STAGES),
        ("microbatch", num_microbatches, MOST_MICROBATCHES),
    ):  # fmt: skip
        if number > most:
            raise ScheduleError(f"{claim} has {_count(number, what)}; a schedule has at most {most:,}")
    if num_stages * num_microbatches > num_actions:
        raise ScheduleError(
            f"{claim} has {_count(num_stages, 'stage')} with a forward for each of {_count(num_microbatches, 'microbatch')}"
            f", but there are only {_count(num_actions, 'action')} in all"
        )


def _count(number: int, of: str) -> str:
    plural = "" if number == 1 else "es" if of.endswith("ch") else "s"
    return f"{number:,} {of}{plural}" if number < 10**18 else f"more than 10**18 {of}{plural}"
