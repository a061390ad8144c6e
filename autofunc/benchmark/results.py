"""A record that shows itself: as a table, and as files to look at and to read again."""

from __future__ import annotations

import json
from pathlib import Path

from autofunc.benchmark.picture import to_png
from autofunc.benchmark.record import Record
from autofunc.benchmark.table import to_table
from autofunc.schedule import draw

DATA, PICTURE, PAGE = "bench.json", "bench.png", "bench.html"
"""Files that `Results.save` writes."""


class Results(Record):
    """The results of `af.bench`: `record[name]`, `record.of("torch")`, `record.answers()`, and ways to show them.

    Example:
        results = af.bench(model, batch, against=["torch"])
        print(results)
        results.save("results")
        again = autofunc.benchmark.Results.read("results/bench.json")
    """

    def table(self, colour: bool = False) -> str:
        """Return tables for a terminal of 80 columns."""
        return to_table(self, colour)

    def __str__(self) -> str:
        return self.table()

    def save(self, folder: str | Path) -> list[Path]:
        """Write bench.json, bench.png and, if there are timelines, bench.html; return their paths.

        Raises:
            OSError: if the folder cannot be written.
        """
        into = Path(folder)
        into.mkdir(parents=True, exist_ok=True)
        into.joinpath(DATA).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        into.joinpath(PICTURE).write_bytes(to_png(self))
        written = [into / DATA, into / PICTURE]
        timelines = [each.timeline for each in self.measured if each.timeline is not None]
        if timelines:
            draw(timelines, into / PAGE)
            written.append(into / PAGE)
        return written

    @classmethod
    def read(cls, path: str | Path) -> Results:
        """Read a bench.json, which has no timelines.

        Raises:
            OSError: if it cannot be read.
            AutofuncError: if it has a different version.
        """
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
