"""A self-contained page of stacked timelines, with zoom and tooltips. No network, no library."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from autofunc.schedule.pictures.blocks import COLOURS, WORDS, blocks_of, letters_of, title
from autofunc.schedule.timing.idle import explain_idle
from autofunc.schedule.timing.timeline import Timeline

_DATA = "/*DATA*/null"


def to_html(timelines: Sequence[Timeline]) -> str:
    """Make the page as text: timelines stacked on one time axis, such as two schedules, or a predicted and a
    measured run."""
    document = {
        "kinds": [{"name": kind.name, "word": WORDS[kind], "colour": COLOURS[kind]} for kind in WORDS],
        "timelines": [_timeline(timeline) for timeline in timelines],
    }
    # "<" cannot end the script from inside a string
    data = json.dumps(document, separators=(",", ":")).replace("<", "\\u003c")
    return files("autofunc.schedule.pictures").joinpath("page.html").read_text(encoding="utf-8").replace(_DATA, data)


def _timeline(timeline: Timeline) -> dict[str, Any]:
    schedule, letters = timeline.schedule, letters_of(timeline.schedule)
    causes: dict[str, int] = {"": 0}
    blocks = [
        [
            block.rank,
            int(block.kind),
            block.stage,
            block.microbatch,
            round(block.start, 9),
            round(block.end, 9),
            round(block.waited, 9),
            causes.setdefault(block.cause, len(causes)),
        ]
        for block in blocks_of(timeline)
    ]
    return {
        "name": title(timeline),
        "ranks": schedule.num_ranks,
        "letters": [letters[stage] for stage in range(schedule.num_stages)],
        "makespan": timeline.makespan,
        "figures": {
            "stages": schedule.num_stages,
            "microbatches": schedule.num_microbatches,
            "makespan": f"{timeline.makespan:.6g}",
            "bubble": f"{timeline.bubble_fraction:.1%}",
            "span bubble": f"{timeline.span_bubble_fraction:.1%}",
            "activations": f"{timeline.peak_microbatches:g} microbatches",
        },
        "idle": [[round(part, 9) for part in idle] for idle in explain_idle(timeline)],
        "causes": list(causes),
        "blocks": blocks,
    }
