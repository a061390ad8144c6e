"""Whether bad input got what it should: one clear error with status 2, quickly, and short."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from autofunc.errors import AutofuncError, PipelineRunError, full_message

MOST_CHARACTERS = 2000
MOST_SECONDS = 5.0
"""Of a processor, at most: the slowest take one, and a machine may be busy."""
MOST_BYTES = 100 * 2**20


class Case(NamedTuple):
    """A file, or several, and what the error about it must say."""

    name: str
    write: Callable[[Path], object]  # into an empty folder; gives what is read
    says: tuple[str, ...]


def fault(act: Callable[[], object], says: tuple[str, ...]) -> str | None:
    """What is wrong with how an action fails; None where nothing is."""
    tracemalloc.start()
    begin = time.process_time()
    try:
        return f"was accepted: {act()!r:.200}"
    except PipelineRunError as error:
        return f"has status 1: {error!s:.200}"
    except AutofuncError as error:
        return _of_message(full_message(error), says) or _of_costs(begin)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"has a traceback: {type(error).__name__}: {error!s:.200}"
    finally:
        tracemalloc.stop()


def _of_message(message: str, says: tuple[str, ...]) -> str | None:
    if len(message) >= MOST_CHARACTERS:
        return f"has a message of {len(message)} characters"
    if not all(each.isprintable() for each in message.split("\n")):
        return f"has control characters in its message: {message!r:.300}"
    lacking = [each for each in says if each not in message]
    return f"does not say {lacking[0]!r}: {message:.300}" if lacking else None


def _of_costs(begin: float) -> str | None:
    seconds, (_, most) = time.process_time() - begin, tracemalloc.get_traced_memory()
    if seconds > MOST_SECONDS:
        return f"took {seconds:.1f} s"
    return f"took {most >> 20} MiB" if most > MOST_BYTES else None


def faults(cases: list[Case], read: Callable[[object], object], folder: Path) -> list[str]:
    """The cases that fail to fail as they should, each with the reason."""
    found = []
    for number, case in enumerate(cases):
        place = folder / str(number)
        place.mkdir()
        given = case.write(place)
        reason = fault(lambda given=given: read(given), case.says)  # type: ignore[misc]
        if reason is not None:
            found.append(f"{case.name} {reason}")
    return found
