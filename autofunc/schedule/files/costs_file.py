"""Costs and memory as a JSON file, so that measured ones can be kept and used by the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from autofunc.errors import ScheduleError, one_of
from autofunc.schedule.files.text_file import StrPath, read_json, write_text
from autofunc.schedule.footprint.memory import Memory
from autofunc.schedule.timing.costs import Costs


def write_costs(path: StrPath, costs: Costs, memory: Memory | None = None) -> None:
    """Write costs, and bytes if given. Times of single edges are written as {"0>1": time}."""
    document = {name: _plain(value) for name, value in vars(costs).items()}
    if memory is not None:
        document["memory"] = {name: _plain(value) for name, value in vars(memory).items()}
    write_text(path, json.dumps(document, indent=1) + "\n")


def read_costs(path: StrPath) -> tuple[Costs, Memory | None]:
    """Read what `write_costs` wrote, or a file written by hand.

    Raises:
        ScheduleError: when there is no such file, or it holds something else.
    """
    document = read_json(path)
    if not isinstance(document, dict):
        raise ScheduleError(f"{path}: expected a mapping with F, I and W, found {type(document).__name__}")
    memory = document.pop("memory", None)
    _check(str(path), document, Costs)
    if isinstance(document.get("comm"), dict):
        document["comm"] = {_edge(str(path), edge): time for edge, time in document["comm"].items()}
    if memory is not None:
        _check(f"{path}: memory", memory, Memory)
    try:
        return Costs(**document), None if memory is None else Memory(**memory)
    except TypeError as error:
        raise ScheduleError(f"{path}: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {f"{sender}>{receiver}": float(time) for (sender, receiver), time in value.items()}
    return float(value) if np.ndim(value) == 0 else [float(one) for one in value]


def _edge(path: str, text: str) -> tuple[int, int]:
    sender, arrow, receiver = text.partition(">")
    if not (arrow and sender.isdigit() and receiver.isdigit()):
        raise ScheduleError(f"{path}: comm names the edge {text!r}; expected sending and receiving stage, such as '0>1'")
    return int(sender), int(receiver)


def _check(where: str, document: Any, kind: type[Costs] | type[Memory]) -> None:
    """Only known keys, and only numbers."""
    known = [field.name for field in fields(kind)]
    if not isinstance(document, dict):
        raise ScheduleError(f"{where}: expected a mapping with {', '.join(known)}")
    for key, value in document.items():
        if key not in known:
            raise ScheduleError(f"{where}: unknown key {key!r}; {one_of(key, known)}")
        numbers = (
            value.values() if isinstance(value, dict) and key == "comm" else value if isinstance(value, list) else [value]
        )
        if not all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in numbers):
            raise ScheduleError(f"{where}: {key}={value!r}; expected a number, or one for each stage")
