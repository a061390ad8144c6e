"""Timelines as a trace for chrome://tracing and ui.perfetto.dev, with arrows from what ranks wait for.

Format: "Trace Event Format", Google (complete events `X`, flow events `s` and `f`, metadata `M`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from autofunc.schedule.pictures.blocks import WORDS, Block, blocks_of, caption
from autofunc.schedule.timing.timeline import Timeline


def to_trace(timelines: Sequence[Timeline], unit_us: float = 1000.0) -> str:
    """Make the JSON document: one process per timeline, one thread per rank.

    Args:
        timelines: what to show.
        unit_us: microseconds in one unit of the timelines: 1000 if costs are in milliseconds.
    """
    events: list[dict[str, Any]] = []
    for process, timeline in enumerate(timelines):
        events.append({"ph": "M", "pid": process, "name": "process_name", "args": {"name": caption(timeline)}})
        for rank in range(timeline.schedule.num_ranks):
            events.append({"ph": "M", "pid": process, "tid": rank, "name": "thread_name", "args": {"name": f"rank {rank}"}})
        blocks = blocks_of(timeline)
        by_words = {f"{block.name} on rank {block.rank}": block for block in blocks}
        for block in blocks:
            track = {"pid": process, "tid": block.rank}
            events.append(
                track
                | {
                    "ph": "X",
                    "name": block.name,
                    "cat": WORDS[block.kind],
                    "ts": block.start * unit_us,
                    "dur": (block.end - block.start) * unit_us,
                    "args": {"stage": block.stage, "microbatch": block.microbatch} | _wait(block),
                }
            )
            if block.cause in by_words:
                maker, number = by_words[block.cause], len(events)
                arrow = {"name": "waits for", "cat": "wait", "id": number}
                from_there = {
                    "ph": "s",
                    "pid": process,
                    "tid": maker.rank,
                    "ts": (maker.end - 1e-6 * (maker.end - maker.start)) * unit_us,
                }
                events += [arrow | from_there, arrow | track | {"ph": "f", "bp": "e", "ts": block.start * unit_us}]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def _wait(block: Block) -> dict[str, Any]:
    return {"waited": block.waited, "for": block.cause} if block.cause else {}
