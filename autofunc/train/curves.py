"""A run as a picture: loss, learning rate and speed by step."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

from autofunc.config.validations import SECTION, display_name, measured_as


class _Curve(NamedTuple):
    name: str  # of the metric in `metrics.jsonl`
    label: str
    colour: str
    marker: str | None = None


_TRAINING = _Curve("loss", "training", "tab:blue")
_VALIDATION_COLOURS = ("tab:orange", "tab:red", "tab:brown", "tab:pink", "tab:olive", "tab:cyan")
_PANELS: Mapping[str, Sequence[_Curve]] = {
    "learning rate": (_Curve("lr", "lr", "tab:purple"),),
    "per second": (
        _Curve("tokens_per_second", "tokens", "tab:green"),
        _Curve("rows_per_second", "rows", "tab:green"),
    ),
}  # fmt: skip
_INCHES = (3.6, 1.8)  # heights of the first panel and of each other panel
_DIGITS = {"lr": ".3g", "tokens_per_second": ",.0f", "rows_per_second": ",.0f"}


def draw_curves(metrics: Path, validations: Iterable[str] = (SECTION,)) -> bytes:
    """Draw a `metrics.jsonl` as a PNG, with a panel for each of loss, learning rate and speed that it contains.

    Args:
        metrics: the file.
        validations: sections of the datasets with a validation loss.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not a metrics file.
    """
    from matplotlib.figure import Figure  # not pyplot, which selects a backend for the whole process

    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    wanted = {"loss": [_TRAINING, *_losses(validations)], **_PANELS}
    found = {title: [(each, _points(lines, each.name)) for each in curves] for title, curves in wanted.items()}
    panels = {title: [each for each in curves if each[1]] for title, curves in found.items()}
    panels = {title: curves for title, curves in panels.items() if curves or title == "loss"}
    heights = [_INCHES[number > 0] for number in range(len(panels))]
    figure = Figure(figsize=(8, sum(heights)), dpi=120, layout="constrained")
    columns = figure.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axes, (title, curves) in zip(columns, panels.items(), strict=True):
        for curve, points in curves:
            steps, values = zip(*points, strict=True)
            label = f"{curve.label}, last {values[-1]:{_DIGITS.get(curve.name, '.3f')}}"
            axes.plot(steps, values, label=label, color=curve.colour, marker=curve.marker, linewidth=1.2, markersize=4)
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        axes.margins(x=0.01)
        if curves:
            axes.legend()
    columns[-1].set_xlabel("step")
    columns[-1].xaxis.get_major_locator().set_params(integer=True)
    made = io.BytesIO()
    figure.savefig(made, format="png")
    return made.getvalue()


def _losses(validations: Iterable[str]) -> list[_Curve]:
    """Return the loss curves of the validation datasets."""
    return [
        _Curve(measured_as(section, "loss"), display_name(section), colour, "o")
        for section, colour in zip(validations, cycle(_VALIDATION_COLOURS))
    ]


def _points(lines: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """Return steps and values, leaving out values that are not numbers."""
    return [(line["step"], line[name]) for line in lines if line.get(name) is not None]
