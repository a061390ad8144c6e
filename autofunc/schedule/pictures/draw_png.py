"""Draw timelines as a PNG picture: the picture of `draw_svg.py`, for places that cannot show an SVG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from autofunc.schedule.pictures.blocks import COLOURS, WORDS, blocks_of, caption, letters_of
from autofunc.schedule.timing.timeline import Timeline

_INCHES, _INCHES_OF_ROW, _INCHES_BESIDE = 12.0, 0.26, 0.9
_CHARACTERS = 190  # that fit side by side, at a label's size


def to_png(timelines: Sequence[Timeline]) -> bytes:
    """Draw timelines on one scale; return the bytes of a PNG."""
    from matplotlib.figure import Figure  # pyplot would choose a backend for the whole process

    rows = [timeline.schedule.num_ranks * _INCHES_OF_ROW + _INCHES_BESIDE for timeline in timelines]
    figure = Figure(figsize=(_INCHES, sum(rows)), dpi=120, layout="constrained")
    panels = figure.subplots(len(timelines), 1, squeeze=False, height_ratios=rows)[:, 0]
    longest = max(timeline.makespan for timeline in timelines)
    for axes, timeline in zip(panels, timelines, strict=True):
        _draw(axes, timeline, longest)
    kinds = sorted({block.kind for timeline in timelines for block in blocks_of(timeline)})
    handles = [panels[0].barh(0, 0, color=COLOURS[kind], label=f"{kind.name} {WORDS[kind]}") for kind in kinds]
    figure.legend(handles=handles, loc="outside lower left", ncols=len(kinds), frameon=False, fontsize=8)
    made = io.BytesIO()
    figure.savefig(made, format="png")
    return made.getvalue()


def _draw(axes: Any, timeline: Timeline, longest: float) -> None:
    ranks, letters = timeline.schedule.num_ranks, letters_of(timeline.schedule)
    axes.barh(range(ranks), timeline.makespan, height=0.9, color="#f0f1f3")
    blocks = blocks_of(timeline)
    axes.barh(
        [block.rank for block in blocks], [block.end - block.start for block in blocks], 0.9,
        [block.start for block in blocks], color=[COLOURS[block.kind] for block in blocks], edgecolor="white", lw=0.4,
    )  # fmt: skip
    for block in blocks:
        label = f"{block.microbatch}{letters[block.stage]}"
        if (block.end - block.start) / longest * _CHARACTERS >= len(label):
            middle = (block.start + block.end) / 2
            axes.text(middle, block.rank, label, ha="center", va="center", fontsize=7, color="#10202e")
    axes.set(xlim=(0, longest), ylim=(ranks - 0.5, -0.5), yticks=range(ranks))
    axes.set_yticklabels([f"rank {rank}" for rank in range(ranks)], fontsize=8)
    axes.set_title(caption(timeline), loc="left", fontsize=9)
    axes.spines[:].set_visible(False)
    axes.tick_params(axis="x", labelsize=8)
