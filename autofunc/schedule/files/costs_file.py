"""Costs and memory as a JSON file, so that measured ones can be kept, and read by the command line."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from autofunc.errors import ScheduleError, one_of
from autofunc.foreign_file import StrPath
from autofunc.schedule.files.text_file import read_json, write_text
from autofunc.schedule.footprint.memory import Memory
from autofunc.schedule.timing.costs import Costs
from autofunc.shown import quoted, reason, shown

_EDGE = re.compile("([0-9]{1,9})>([0-9]{1,9})")
_BY_STAGE = {"F", "I", "W", *(field.name for field in fields(Memory))}


def write_costs(path: StrPath, costs: Costs, memory: Memory | None = None) -> None:
    """Write costs, and memory if given. Times of single edges are written as {"0>1": time}.

    Raises:
        ScheduleError: if the file cannot be written.
    """
    document = {name: _plain(value) for name, value in vars(costs).items()}
    if memory is not None:
        document["memory"] = {name: _plain(value) for name, value in vars(memory).items()}
    write_text(path, json.dumps(document, indent=1) + "\n")


def read_costs(path: StrPath) -> tuple[Costs, Memory | None]:
    """Read what `write_costs` wrote, or a file written by hand.

    Raises:
        ScheduleError: if the file does not exist, or does not hold costs.
    """
    document = read_json(path)
    try:
        return _from_document(document)
    except (ScheduleError, TypeError) as error:
        raise ScheduleError(f"{shown(path)}: {reason(error)}") from error


def _from_document(document: Any) -> tuple[Costs, Memory | None]:
    if not isinstance(document, dict):
        raise ScheduleError(f"expected a mapping with F, I and W, found {type(document).__name__}")
    memory = document.pop("memory", None)
    _check("", document, Costs)
    if isinstance(document.get("comm"), dict):
        document["comm"] = {_edge(edge): time for edge, time in document["comm"].items()}
    if memory is not None:
        _check("memory: ", memory, Memory)
    return Costs(**document), None if memory is None else Memory(**memory)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {f"{sender}>{receiver}": float(time) for (sender, receiver), time in value.items()}
    return float(value) if np.ndim(value) == 0 else [float(one) for one in value]


def _edge(text: str) -> tuple[int, int]:
    found = _EDGE.fullmatch(text)
    if not found:
        raise ScheduleError(f"comm names the edge {quoted(text)}; expected sending and receiving stage, such as '0>1'")
    return int(found[1]), int(found[2])


def _check(where: str, document: Any, kind: type[Costs] | type[Memory]) -> None:
    """Refuse unknown keys, and values that are not numbers."""
    known = [field.name for field in fields(kind)]
    if not isinstance(document, dict):
        raise ScheduleError(f"{where}expected a mapping with {', '.join(known)}")
    for key, value in document.items():
        if key not in known:
            raise ScheduleError(f"{where}unknown key {quoted(key)}; {one_of(key, known)}")
        for name, number in _numbers(key, value):
            if not _is_amount(number):
                expected = f"a number, 0 or more{', or one for each stage' if key in _BY_STAGE else ''}"
                raise ScheduleError(f"{where}{shown(name)}={quoted(number)}; expected {expected}")


def _numbers(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what should be numbers in a value, by name."""
    if key == "comm" and isinstance(value, dict):
        yield from ((f"comm[{edge}]", time) for edge, time in value.items())
    elif key in _BY_STAGE and isinstance(value, list):
        yield from ((f"{key}[{stage}]", each) for stage, each in enumerate(value))
    else:
        yield key, value


def _is_amount(number: Any) -> bool:
    """Return whether it is a number that fits a float, 0 or more."""
    is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
    return is_number and 0 <= number <= sys.float_info.max
