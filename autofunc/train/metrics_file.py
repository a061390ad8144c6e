"""A line of JSON for every step of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class MetricsFile:
    """`metrics.jsonl`: one JSON object per line, written as it happens.

    Args:
        path: of the file.
        after_step: the step a resumed run starts after; lines of later steps are removed, because they will come again.
    """

    def __init__(self, path: Path, after_step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = _until(path, after_step) if after_step and path.is_file() else []
        self._file = path.open("w", encoding="utf-8")
        self._file.writelines(kept)
        self.error: OSError | None = None  # why lines are missing: a full disk does not end the run

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
            self._file.close()  # flushes, which may fail
        except OSError as error:
            self.error = self.error or error


def _until(path: Path, step: int) -> list[str]:
    """Return a file's lines up to a step. A killed process may have left the last line unfinished."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return kept
