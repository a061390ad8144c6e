"""Schedules as plain data: built, checked, lowered, simulated and drawn without importing torch.

Example:
    >>> from autofunc import schedule
    >>> s = schedule.build("1f1b", num_ranks=4, num_microbatches=8)
    >>> schedule.validate(schedule.lower(s))
    >>> schedule.simulate(s).makespan
    33.0
"""

from autofunc.schedule.effects import Dataflow, Edge, chain
from autofunc.schedule.files.costs_file import read_costs, write_costs
from autofunc.schedule.files.schedule_file import (
    SUFFIXES,
    check_suffix,
    from_csv,
    from_json,
    read_file,
    to_csv,
    to_json,
    write_file,
)
from autofunc.schedule.footprint.live import live_bytes, peak_bytes
from autofunc.schedule.footprint.memory import Memory
from autofunc.schedule.footprint.settle import settled_sends
from autofunc.schedule.footprint.storage import StageBytes
from autofunc.schedule.ir import Action, Kind, Row, Schedule
from autofunc.schedule.laws.error_grid import grid
from autofunc.schedule.laws.validator import validate
from autofunc.schedule.lowering.lowered_form import lower
from autofunc.schedule.lowering.sharding import Unshard
from autofunc.schedule.named.custom import Function
from autofunc.schedule.named.registry import (
    build,
    build_row,
    default_stages_per_rank,
    is_looped,
    is_named,
    names,
    normalise,
)
from autofunc.schedule.pictures.drawing import draw
from autofunc.schedule.searching.random_search import lower_bound, search
from autofunc.schedule.text import from_actions, from_text, parse_action, to_text
from autofunc.schedule.timing.costs import Costs
from autofunc.schedule.timing.fit import costs_of
from autofunc.schedule.timing.idle import Idle, explain_idle
from autofunc.schedule.timing.simulation import expected_makespan, simulate
from autofunc.schedule.timing.timeline import Timeline, Turn

__all__ = [
    "SUFFIXES",
    "Action",
    "Costs",
    "Dataflow",
    "Edge",
    "Function",
    "Idle",
    "Kind",
    "Memory",
    "Row",
    "Schedule",
    "StageBytes",
    "Timeline",
    "Turn",
    "Unshard",
    "build",
    "build_row",
    "chain",
    "check_suffix",
    "costs_of",
    "default_stages_per_rank",
    "draw",
    "expected_makespan",
    "explain_idle",
    "from_actions",
    "from_csv",
    "from_json",
    "from_text",
    "grid",
    "is_looped",
    "is_named",
    "live_bytes",
    "lower",
    "lower_bound",
    "names",
    "normalise",
    "parse_action",
    "peak_bytes",
    "read_costs",
    "read_file",
    "search",
    "settled_sends",
    "simulate",
    "to_csv",
    "to_json",
    "to_text",
    "validate",
    "write_costs",
    "write_file",
]


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
