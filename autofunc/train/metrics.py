"""What a run leaves behind: a line of JSON for every step, and the loss curve as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class MetricsFile:
    """`metrics.jsonl`: one JSON object per line, written as it happens."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")

    def write(self, **values: Any) -> None:
        """Append a line. Floats keep all their digits."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def draw_loss_curve(metrics: Path, picture: Path) -> None:
    """Draw the losses of a `metrics.jsonl` into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    for key, label, style in (
        ("loss", "training", {"linewidth": 1.0, "color": "tab:blue"}),
        ("validation_loss", "validation", {"linewidth": 1.5, "color": "tab:orange", "marker": "o"}),
    ):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=f"{label}, last {points[-1][1]:.3f}", **style)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture)
    pyplot.close(figure)
