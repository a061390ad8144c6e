"""Draw timelines as an SVG picture: one row per rank, time from left to right, timelines stacked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from autofunc.schedule.pictures.blocks import COLOURS, WORDS, Block, blocks_of, caption, letters_of
from autofunc.schedule.timing.timeline import Timeline

_ROW, _GAP, _LEFT, _RIGHT, _CAPTION, _AXIS, _LEGEND = 24, 3, 58, 16, 26, 22, 30
_CHARACTER = 6.6  # width of a digit at the size of labels


def to_svg(timelines: Sequence[Timeline], width: int = 1200) -> str:
    """Draw timelines on one scale; return an SVG document `width` pixels wide."""
    longest = max(timeline.makespan for timeline in timelines)
    scale = (width - _LEFT - _RIGHT) / longest
    parts: list[str] = []
    top = 8
    kinds = set()
    for timeline in timelines:
        letters = letters_of(timeline.schedule)
        parts.append(f'<text x="{_LEFT}" y="{top + 16}" class="caption">{escape(caption(timeline))}</text>')
        top += _CAPTION
        for rank in range(timeline.schedule.num_ranks):
            y = top + rank * (_ROW + _GAP)
            parts.append(f'<text x="{_LEFT - 8}" y="{y + 16}" class="rank">rank {rank}</text>')
            parts.append(
                f'<rect x="{_LEFT}" y="{y}" width="{timeline.makespan * scale:.2f}" height="{_ROW}" class="idle"/>'
            )
        for block in blocks_of(timeline):
            kinds.add(block.kind)
            parts.append(_block(block, top, scale, letters[block.stage]))
        top += timeline.schedule.num_ranks * (_ROW + _GAP)
        parts += _axis(timeline.makespan, scale, top)
        top += _AXIS
    x = _LEFT
    for kind in sorted(kinds):
        parts.append(f'<rect x="{x}" y="{top + 6}" width="14" height="14" rx="2" fill="{COLOURS[kind]}"/>')
        parts.append(f'<text x="{x + 20}" y="{top + 18}" class="legend">{kind.name} {WORDS[kind]}</text>')
        x += 44 + int(len(WORDS[kind] + kind.name) * _CHARACTER)
    if any(timeline.schedule.num_stages > timeline.schedule.num_ranks for timeline in timelines):
        parts.append(f'<text x="{x}" y="{top + 18}" class="legend">a, b, ...: first, second stage of the rank</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top + _LEGEND}" '
        f'viewBox="0 0 {width} {top + _LEGEND}" font-family="system-ui, sans-serif">\n'
        "<style>.caption{font-size:14px;font-weight:600;fill:#333}.rank{font-size:12px;text-anchor:end;fill:#555}"
        ".label{font-size:11px;text-anchor:middle;fill:#10202e}.legend,.tick{font-size:12px;fill:#555}"
        ".tick{text-anchor:middle}.idle{fill:#f0f1f3}line{stroke:#bbb}</style>\n"
        f'<rect width="{width}" height="{top + _LEGEND}" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _block(block: Block, top: int, scale: float, letter: str) -> str:
    """Draw a rectangle with the microbatch in it, if there is room; later stages of a rank are darker."""
    x, wide = _LEFT + block.start * scale, (block.end - block.start) * scale
    y = top + block.rank * (_ROW + _GAP)
    label = f"{block.microbatch}{letter}"
    shade = "" if letter in ("", "a") else f'<rect x="{x:.2f}" y="{y}" width="{wide:.2f}" height="{_ROW}" opacity="0.18"/>'
    text = f'<text x="{x + wide / 2:.2f}" y="{y + 16}" class="label">{label}</text>'
    return (
        f'<g><title>{block.name}: {block.start:g} to {block.end:g}</title><rect x="{x:.2f}" y="{y}" width="{wide:.2f}" '
        f'height="{_ROW}" fill="{COLOURS[block.kind]}" stroke="white" stroke-width="{min(1.0, wide / 8):.2f}"/>{shade}'
        + (text if wide >= len(label) * _CHARACTER + 2 else "")
        + "</g>"
    )


def _axis(makespan: float, scale: float, y: int) -> list[str]:
    """Draw ticks at round numbers."""
    step = round_step(makespan / 10)
    parts = []
    for number in range(int(makespan / step + 1e-9) + 1):
        x = _LEFT + number * step * scale
        parts.append(f'<line x1="{x:.2f}" y1="{y}" x2="{x:.2f}" y2="{y + 4}"/>')
        parts.append(f'<text x="{x:.2f}" y="{y + 17}" class="tick">{number * step:g}</text>')
    return parts


def round_step(least: float) -> float:
    """Return the smallest of 1, 2, 5 times a power of ten that is at least `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * (1 - 1e-9))
