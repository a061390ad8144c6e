"""What a run leaves behind: a line of JSON for every step, and the loss curve as a picture."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from autofunc.config.validations import SECTION, measured_as


class MetricsFile:
    """`metrics.jsonl`: one JSON object per line, written as it happens.

    Args:
        path: of the file.
        after_step: of a run that goes on: lines of later steps are left out, they will come again.
    """

    def __init__(self, path: Path, after_step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = _until(path, after_step) if after_step and path.is_file() else []
        self._file = path.open("w", encoding="utf-8")
        self._file.writelines(kept)
        self.error: OSError | None = None  # why lines are missing: a full disk ends no run

    def write(self, **values: Any) -> None:
        """Append a line. Floats keep all their digits."""
        if self.error is None:
            try:
                self._file.write(json.dumps(values) + "\n")
                self._file.flush()
            except OSError as error:
                self.error = error

    def close(self) -> None:
        """Close the file."""
        try:
            self._file.close()  # which writes what could not be written before
        except OSError as error:
            self.error = self.error or error


def _until(path: Path, step: int) -> list[str]:
    """The lines of a file of steps up to one. A process that was killed may have left the last line unfinished."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return kept


def draw_loss_curve(metrics: Path, picture: Path, validations: Iterable[str] = (SECTION,)) -> None:
    """Draw the losses of a `metrics.jsonl` into a PNG: in training, and on the datasets of sections of validation."""
    from matplotlib.figure import Figure  # and not pyplot, which chooses a backend for the whole process

    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    curves: list[tuple[str, str, float, str, str | None]] = [("loss", "training", 1.0, "C0", None)]
    for number, section in enumerate(validations, 1):
        curves.append(
            (measured_as(section, "loss"), section.replace("_dataset", "").replace("_", " "), 1.5, f"C{number}", "o")
        )
    for key, label, width, colour, marker in curves:
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(
                steps, values, label=f"{label}, last {values[-1]:.3f}", linewidth=width, color=colour, marker=marker
            )  # fmt: skip
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture)
