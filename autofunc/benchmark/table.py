"""A record as tables for a terminal of 80 columns."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table

from autofunc.benchmark.record import Measured, Record, Spread
from autofunc.shown import literal, printable, size_in_words

WIDTH = 80


def to_table(record: Record, colour: bool = False) -> str:
    """Return times, memory, answers, and what was left out, as text.

    Args:
        record: the results.
        colour: paint with ANSI colours.
    """
    text = io.StringIO()
    console = Console(file=text, width=WIDTH, force_terminal=colour, no_color=not colour, highlight=False)
    if record.measured:
        console.print(literal(_heading(record)))
        console.print(_times(record))
        console.print(_memory(record))
        for what, ours, theirs, ratio in record.answers():
            console.print(literal(f"{what}: {_times_in_words(ratio)}\n  {ours.name}, {theirs.name}"))
        for line in _footnotes(record):
            console.print(literal(line))
    for each in record.left_out:
        console.print(literal(f"not measured: {printable(each.name)}: {printable(each.why)}"))
    return text.getvalue().rstrip("\n")


def _heading(record: Record) -> str:
    setting = record.setting
    return (
        f"{setting['model']}: {setting['parameters']:,} parameters, {setting[record.unit]:,} {record.unit} a step, "
        f"{setting['processes']} process{'es' * (setting['processes'] > 1)}, "
        f"{len(record.measured[0].step_ms)} rounds"
    )


def _times(record: Record) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("step", overflow="fold")
    has_mfu = any(each.mfu is not None for each in record.measured)
    has_bubble = any(each.schedule_bubble is not None for each in record.measured)
    titles = ["ms", "least", "most", "speed", f"{record.unit}/s", *["MFU"] * has_mfu, *["bubble"] * has_bubble]
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    fastest = min(record.measured, key=lambda each: each.ms.median)
    for each in record.measured:
        ratio = record.speedup(each, record.baseline)
        cells = [
            _digits(each.ms.median), _digits(each.ms.least), _digits(each.ms.most), f"{ratio.median:.2f}x",
            _count(each.units_per_second),
        ]  # fmt: skip
        cells += [f"{each.mfu:.1%}" if each.mfu is not None else "-"] * has_mfu
        cells += [_bubble(each)] * has_bubble
        table.add_row(literal(each.name), *cells, style="green" if each is fastest else None)
    return table


def _memory(record: Record) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("memory of a step", overflow="fold")
    for title in ("peak", "kept", "predicted", "build s", "gradients"):
        table.add_column(title, justify="right", no_wrap=True)
    for each in record.measured:
        table.add_row(
            literal(each.name), size_in_words(max(each.peak_bytes)), _largest(each.live_bytes),
            _largest(each.predicted_bytes), f"{each.build_s:.1f}",
            "-" if each.gradient_error is None else f"{each.gradient_error:.0e}",
        )  # fmt: skip
    return table


def _footnotes(record: Record) -> list[str]:
    lines = [f"speed: over {record.baseline.name}, the median of pairs; bytes: of the rank with the most"]
    if any(each.schedule_bubble is not None for each in record.measured):
        lines.append("bubble: measured / of the schedule with this run's costs")
        if all(each.bubble is None for each in record.measured):
            lines[-1] = "bubble: of the schedule with this run's costs; ranks of one process take turns"
    lines.append("peak: with temporaries; kept: between actions, and as predicted from the graphs")
    return lines


def _times_in_words(ratio: Spread) -> str:
    return f"{ratio.median:.2f}x ({ratio.least:.2f} to {ratio.most:.2f})"


def _bubble(each: Measured) -> str:
    if each.schedule_bubble is None:
        return "-"
    of_schedule = f"{100 * each.schedule_bubble:.0f} %"
    return of_schedule if each.bubble is None else f"{100 * each.bubble:.0f} / {of_schedule}"


def _largest(by_rank: tuple[int, ...] | None) -> str:
    return "-" if by_rank is None else size_in_words(max(by_rank))


def _digits(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 1000 else f"{ms:.1f}"


def _count(number: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= 10 * size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,.0f}"
