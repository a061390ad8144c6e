"""One family of errors, and the words they share.

Every error that a user can cause is an `AutofuncError`: it names what was given, what was expected, and the nearest
thing that would work. A subclass also derives from the built-in a Python programmer would catch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AutofuncError(Exception):
    """Base of every error raised on purpose by autofunc."""


class ConfigError(AutofuncError, ValueError):
    """A configuration file or an override says something that cannot be done."""


class ModelError(AutofuncError, ValueError):
    """A model, its parameters or its ties do not fit together."""


class SplitError(AutofuncError, ValueError):
    """Split points that do not name legal places to cut the model."""


class ScheduleError(AutofuncError, ValueError):
    """A schedule that is unknown, cannot be built for these numbers, or breaks a law of schedules."""


class BatchError(AutofuncError, ValueError):
    """A batch that cannot be cut into microbatches, or a loss that is not what the contract asks for."""


class MeshError(AutofuncError, ValueError):
    """A device mesh that does not match the processes, the schedule or the stages."""


class DataError(AutofuncError, ValueError):
    """A dataset that is missing, empty or of another schema."""


class PipelineRunError(AutofuncError, RuntimeError):
    """An action failed while the pipeline ran. Carries where: rank, step, action and the grid with the action marked."""


class PeerLostError(PipelineRunError):
    """A rank waited for another that is gone or too late: a consequence, the cause is on the other rank."""


def one_of(given: object, known: Iterable[object]) -> str:
    """A half sentence that suggests the nearest of `known` for `given`, and lists them all when they are few.

    >>> one_of("1f1", ["gpipe", "1f1b"])
    'did you mean 1f1b? Known: gpipe, 1f1b'
    """
    names = [str(name) for name in known]
    near = difflib.get_close_matches(str(given), names, n=3, cutoff=0.5)
    listed = ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")
    suggestion = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{suggestion}Known: {listed}" if names else f"{suggestion}There are none"
