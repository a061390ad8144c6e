"""Debugging through the environment: `AUTOFUNC_TRACE=1` prints each action, `AUTOFUNC_DEBUG=nan` checks its values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autofunc.engine import Microbatch
from autofunc.errors import AutofuncError, one_of
from autofunc.runtime.executor import Observer
from autofunc.runtime.not_finite import finite_check
from autofunc.runtime.observe import Trace
from autofunc.runtime.plan import Plan
from autofunc.runtime.program import Program
from autofunc.runtime.step import Observe
from autofunc.users_lines import DEBUG, WHOLE, words_of

WORDS = (WHOLE, "nan")
"""Words of AUTOFUNC_DEBUG, separated by commas: full tracebacks; checks of all values."""


def debug_words(environment: Mapping[str, str]) -> frozenset[str]:
    """Return the words in AUTOFUNC_DEBUG.

    Raises:
        AutofuncError: for an unknown word.
    """
    words = words_of(environment)
    for word in words.difference(WORDS):
        raise AutofuncError(f"{DEBUG}={environment[DEBUG]}: {one_of(word, WORDS)}")
    return words


def observe_as(environment: Mapping[str, str]) -> Observe | None:
    """Return the function that creates the observers of every step; None if the environment asks for none.

    Raises:
        AutofuncError: for an unknown word in AUTOFUNC_DEBUG.
    """
    trace, check = environment.get("AUTOFUNC_TRACE") == "1", "nan" in debug_words(environment)
    if not (trace or check):
        return None

    def observe(plan: Plan, program: Program, microbatches: Sequence[Microbatch]) -> list[Observer]:
        traces: list[Observer] = [Trace(program)] if trace else []
        return [*traces, *(finite_check(plan, program, microbatches) if check else [])]

    return observe
