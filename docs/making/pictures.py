"""The pictures of the documentation, drawn by autofunc itself: `python docs/making/pictures.py` writes docs/pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from autofunc import schedule
from autofunc.schedule.pictures.blocks import COLOURS, blocks_of
from autofunc.schedule.pictures.draw_svg import to_svg

FOLDER = Path(__file__).parents[1] / "pictures"

_STYLE = (
    "<style>text{font-size:13px;fill:#333;text-anchor:middle}.small{font-size:11px;fill:#666}"
    ".left{text-anchor:start}.title{font-weight:600;text-anchor:start}</style>"
)


def _timeline(name: str, num_ranks: int, num_microbatches: int, comm: float = 0.0) -> schedule.Timeline:
    """A step of a named schedule. A rank's F, I and W take 1 each, however many stages it has."""
    s = schedule.build(name, num_ranks=num_ranks, num_microbatches=num_microbatches)
    costs = schedule.Costs(F=1, I=1, W=1, comm=comm)
    return schedule.simulate(s, costs.scaled(s.num_ranks / s.num_stages))


def one_schedule() -> str:
    """1F1B on four ranks."""
    return to_svg([_timeline("1f1b", 4, 8)], width=900)


def bubbles() -> str:
    """Three schedules of the same work on one scale."""
    return to_svg([_timeline(name, 4, 8) for name in ("gpipe", "1f1b", "zb_h1")], width=900)


def split_backward() -> str:
    """The same step with a whole backward, and with its two halves."""
    return to_svg([_timeline("1f1b", 2, 4), _timeline("zb_h1", 2, 4)], width=760)


def transfers() -> str:
    """1F1B with transfers that take no time, and half as long as a forward."""
    return to_svg([_timeline("1f1b", 4, 8, comm=0.0), _timeline("1f1b", 4, 8, comm=0.5)], width=900)


def _canvas(width: int, height: int, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="system-ui, sans-serif">\n{_STYLE}\n<rect width="{width}" height="{height}" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _box(x: float, y: float, width: float, height: float, text: str, fill: str) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" fill="{fill}" stroke="#8a94a6"/>'
        f'<text x="{x + width / 2:g}" y="{y + height / 2 + 4.5:g}">{escape(text)}</text>'
    )


def _arrow(x: float, y: float, length: float) -> str:
    end = x + length
    return f'<path d="M{x:g} {y:g}H{end - 5:g}" stroke="#555" fill="none"/><path d="M{end:g} {y:g}l-7 -4v8z" fill="#555"/>'


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(text)}</text>'


_SHADES = ("#dbe7f6", "#dcefdc", "#fbe9cf", "#eedcf3")


def stages() -> str:
    """A model of layers, cut into four stages, and where two ranks hold them: in a loop, and in a V."""
    layers = ["tokens", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "blocks.4", "norm", "head"]
    cut = [0, 0, 1, 1, 2, 2, 3, 3]  # stage of each layer
    parts = [_text(10, 22, "split_points: [blocks.1, blocks.3, norm]", "title")]
    x = 10.0
    for number, (layer, stage) in enumerate(zip(layers, cut, strict=True)):
        if number and cut[number - 1] != stage:
            parts.append(_arrow(x - 2, 54, 26))
            x += 26
        parts.append(_box(x, 38, 76, 32, layer, _SHADES[stage]))
        if not number or cut[number - 1] != stage:
            parts.append(_text(x + 78, 90, f"stage {stage}", "small"))
        x += 80
    for row, (name, title) in enumerate((("interleaved_1f1b", "in a loop (interleaved)"), ("zbv", "in a V"))):
        s = schedule.build(name, num_ranks=2, num_microbatches=4)
        left = 10 + row * 370
        parts.append(_text(left, 128, title, "title"))
        for rank in range(2):
            parts.append(_text(left, 158 + rank * 40, f"rank {rank}", "left"))
            held = [stage for stage in range(4) if s.placement[stage] == rank]
            for place, stage in enumerate(held):
                parts.append(_box(left + 60 + place * 110, 140 + rank * 40, 100, 28, f"stage {stage}", _SHADES[stage]))
    return _canvas(750, 220, parts)


def engine() -> str:
    """One trace of a stage and what is cut out of it."""
    f, i, w = (COLOURS[kind] for kind in (schedule.Kind.F, schedule.Kind.I, schedule.Kind.W))
    parts = [
        _box(10, 70, 130, 44, "stage function", "#eef0f4"),
        _arrow(144, 92, 46),
        _text(166, 82, "trace", "small"),
        _box(194, 70, 150, 44, "forward + gradients", "#eef0f4"),
        _arrow(348, 92, 46),
        _text(370, 82, "cut", "small"),
        _box(398, 16, 250, 36, "F: x, params -> y, residuals", f),
        _box(398, 74, 250, 36, "I: dy, residuals -> dx, residuals", i),
        _box(398, 132, 250, 36, "W: residuals -> d params", w),
        _text(658, 38, "forward", "left small"),
        _text(658, 96, "input gradient", "left small"),
        _text(658, 154, "weight gradient", "left small"),
        _text(398, 192, "B is I and W in one piece", "left small"),
    ]
    return _canvas(760, 206, parts)


def _alive(timeline: schedule.Timeline, rank: int) -> list[tuple[float, float]]:
    """(time, microbatches alive) whenever that changes on a rank: from the start of F to the end of B or W."""
    share = timeline.schedule.num_ranks / timeline.schedule.num_stages
    last = {schedule.Kind.B, schedule.Kind.W}
    changes: dict[float, float] = {}
    for block in blocks_of(timeline):
        if block.rank == rank and block.kind == schedule.Kind.F:
            changes[block.start] = changes.get(block.start, 0.0) + share
        if block.rank == rank and block.kind in last:
            changes[block.end] = changes.get(block.end, 0.0) - share
    points, alive = [(0.0, 0.0)], 0.0
    for time, change in sorted(changes.items()):
        alive += change
        points.append((time, alive))
    return points


def residuals() -> str:
    """How many microbatches' residuals rank 0 holds during a step, under three schedules."""
    left, top, wide, high = 50.0, 34.0, 620.0, 170.0
    lines = {"gpipe": "#4c78a8", "1f1b": "#59a14f", "v_min": "#e15759"}
    timelines = {name: _timeline(name, 4, 8) for name in lines}
    longest = max(timeline.makespan for timeline in timelines.values())
    parts = [_text(left, 20, "microbatches whose residuals rank 0 of 4 holds; 8 in a step", "title")]
    for level in range(0, 9, 2):
        y = top + high * (1 - level / 8)
        parts.append(f'<path d="M{left:g} {y:g}H{left + wide:g}" stroke="#e3e5ea"/>')
        parts.append(_text(left - 14, y + 4, str(level), "small"))
    for time in range(0, int(longest) + 1, 5):
        parts.append(_text(left + wide * time / longest, top + high + 18, str(time), "small"))
    for place, (name, colour) in enumerate(lines.items()):
        path = ""
        for time, alive in _alive(timelines[name], 0):
            x, y = left + wide * time / longest, top + high * (1 - alive / 8)
            path += f"H{x:.1f}V{y:.1f}" if path else f"M{x:.1f} {y:.1f}"
        parts.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<rect x="{left + wide + 14:g}" y="{top + 22 * place:g}" width="12" height="12" fill="{colour}"/>')
        parts.append(_text(left + wide + 32, top + 11 + 22 * place, name, "left"))
    return _canvas(760, 236, parts)


PICTURES: dict[str, Callable[[], str]] = {
    "stages": stages,
    "schedule": one_schedule,
    "engine": engine,
    "split_backward": split_backward,
    "residuals": residuals,
    "bubbles": bubbles,
    "transfers": transfers,
}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw())
