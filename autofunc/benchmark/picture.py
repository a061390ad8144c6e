"""A record as a picture: step times as bars with their spread, and memory against time."""

from __future__ import annotations

import io

from autofunc.benchmark.contender import AUTOFUNC, PLAIN, TORCH
from autofunc.benchmark.record import Measured, Record

_COLOURS = {AUTOFUNC: "#3b78c3", TORCH: "#e08a3c", PLAIN: "#8a8f98"}
_INCHES_A_BAR, _INCHES_BESIDE, _INCHES_WIDE = 0.28, 1.5, 12.0
_MEBI = 1 << 20


def to_png(record: Record) -> bytes:
    """Return the record drawn as a PNG."""
    from matplotlib.figure import Figure  # not pyplot, which sets a backend for the whole process

    ordered = sorted(record.measured, key=lambda each: each.ms.median)
    height = max(len(ordered) * _INCHES_A_BAR + _INCHES_BESIDE, 4.5)
    figure = Figure(figsize=(_INCHES_WIDE, height), dpi=120, layout="constrained")
    bars, points = figure.subplots(1, 2, width_ratios=(3, 2))
    medians = [each.ms.median for each in ordered]
    below = [each.ms.median - each.ms.least for each in ordered]
    above = [each.ms.most - each.ms.median for each in ordered]
    bars.barh(
        range(len(ordered)), medians, xerr=(below, above), color=[_colour(each) for each in ordered], height=0.7,
        error_kw={"ecolor": "#30363d", "capsize": 2, "elinewidth": 1},
    )  # fmt: skip
    bars.set(yticks=range(len(ordered)), ylim=(len(ordered) - 0.5, -0.5), xlim=(0, None))
    bars.set_yticklabels([each.name for each in ordered], fontsize=8)
    bars.set_xlabel("step, ms: median, min and max")
    bars.set_title(str(record.setting["model"]), loc="left", fontsize=10)
    bars.grid(axis="x", alpha=0.3)
    for number, each in enumerate(ordered):
        points.scatter(each.ms.median, max(each.peak_bytes) / _MEBI, color=_colour(each), s=36, zorder=3)
        points.annotate(
            str(number + 1), (each.ms.median, max(each.peak_bytes) / _MEBI), textcoords="offset points", xytext=(5, 3),
            fontsize=7,
        )  # fmt: skip
        bars.text(0, number, f" {number + 1}", va="center", fontsize=7, color="white")
    points.margins(0.12)
    points.set(xlabel="step, ms", ylabel="peak per rank, MiB", xlim=(0, None), ylim=(0, None))
    points.set_title("memory against time, numbered like the bars", loc="left", fontsize=10)
    points.grid(alpha=0.3)
    for axes in (bars, points):
        axes.spines[["top", "right"]].set_visible(False)
    sides = [side for side in _COLOURS if any(each.contender.side == side for each in ordered)]
    handles = [points.scatter([], [], color=_COLOURS[side], label=side) for side in sides]
    points.legend(handles=handles, frameon=False, fontsize=8)
    made = io.BytesIO()
    figure.savefig(made, format="png")
    return made.getvalue()


def _colour(each: Measured) -> str:
    return _COLOURS[each.contender.side]
