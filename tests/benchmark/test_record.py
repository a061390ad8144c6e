"""Reports of measurements: ratios, answers, JSON, tables of 80 columns, a picture."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from autofunc import schedule
from autofunc.benchmark import Contender, LeftOut, Measured, Results
from autofunc.benchmark.contender import AUTOFUNC, TORCH
from autofunc.errors import AutofuncError


def measured(name: str, contender: Contender, *ms: float, **changed: Any) -> Measured:
    known: dict[str, Any] = {
        "build_s": 1.0, "gradient_error": 1e-7, "units_per_second": 1e6, "mfu": None, "bubble": 0.2, "schedule_bubble": 0.1,
        "peak_bytes": (1 << 20, 1 << 21), "live_bytes": (1 << 20, 1 << 20), "predicted_bytes": (1 << 20, 1 << 20),
    }  # fmt: skip
    return Measured(name, contender, ms, **{**known, **changed})


def results() -> Results:
    s = schedule.simulate(schedule.build("1f1b", num_ranks=2, num_microbatches=4))
    return Results(
        (
            measured("autofunc 1f1b graph", Contender(AUTOFUNC, "1f1b", 2, 8, 2), 10.0, 12.0, 11.0, timeline=s),
            measured("torch 1F1B eager", Contender(TORCH, "1F1B", 2, 8, 2, "eager"), 20.0, 24.0, 33.0, live_bytes=None),
            measured("autofunc zb_h1 graph", Contender(AUTOFUNC, "zb_h1", 2, 8, 2), 9.0, 14.0, 15.0, mfu=0.5),
            measured(
                "torch Interleaved1F1B compiled", Contender(TORCH, "Interleaved1F1B", 2, 8, 4, "eager", True),
                5.0, 6.0, 7.0, bubble=None, predicted_bytes=None,
            ),
        ),
        (LeftOut("torch zb_h1", "torch.distributed.pipelining does not have this schedule"),),
        {"model": "M", "parameters": 1000, "rows": 8, "tokens": 1024, "processes": 2},
        "tokens",
    )  # fmt: skip


def test_ratios_are_paired() -> None:
    found = results()
    assert found.baseline.name == "torch Interleaved1F1B compiled", "the fastest of torch"
    assert found.speedup(found["autofunc 1f1b graph"], found["torch 1F1B eager"]) == (2.0, 2.0, 3.0)
    asked = {what: (ours.name, theirs.name, ratio.median) for what, ours, theirs, ratio in found.answers()}
    assert asked == {
        "best against best": ("autofunc 1f1b graph", "torch Interleaved1F1B compiled", 0.5),
        "best against torch's eager": ("autofunc 1f1b graph", "torch 1F1B eager", 2.0),
        "best against torch's compiled": ("autofunc 1f1b graph", "torch Interleaved1F1B compiled", 0.5),
    }
    with pytest.raises(AutofuncError, match="did you mean torch 1F1B eager"):
        found["torch 1F1B"]


def test_json_round_trip(tmp_path: Path) -> None:
    found = results()
    written = found.save(tmp_path / "new")
    assert [path.name for path in written] == ["bench.json", "bench.png", "bench.html"]
    again = Results.read(tmp_path / "new" / "bench.json")
    assert again == found, "but for timelines"
    said = json.loads((tmp_path / "new" / "bench.json").read_text())
    first = said["contenders"][0]
    assert first["median_ms"] == 11.0 and first["schedule"] == "1f1b" and said["baseline"] == found.baseline.name
    assert first["speedup_over_baseline"] == {"median": 0.5, "least": 0.5, "most": pytest.approx(7 / 11)}
    with pytest.raises(AutofuncError, match="version 7"):
        Results.from_dict({**said, "version": 7})
    assert "1f1b" in (tmp_path / "new" / "bench.html").read_text()


def test_tables_fit_and_are_complete() -> None:
    text = results().table()
    assert max(map(len, text.splitlines())) <= 80 and "\x1b" not in text
    for part in ("11.0", "1M", "50.0%", "20 / 10 %", "2 MiB", "best against best: 0.50x (0.50 to 0.64)"):
        assert part in text.replace("1 M", "1M"), part
    assert "not measured: torch zb_h1: torch.distributed.pipelining does not have this schedule" in " ".join(text.split())
    assert "\x1b[" in results().table(colour=True)
    empty = Results((), results().left_out, {}, "rows")
    assert empty.table().startswith("not measured") and empty.to_dict()["baseline"] is None


def test_the_picture_has_a_bar_for_each() -> None:
    from autofunc.benchmark.picture import to_png

    few = matplotlib.image.imread(io.BytesIO(to_png(results())))
    many = Results(results().measured * 8, (), results().setting, "tokens")
    assert few.shape[1] == 1440 and matplotlib.image.imread(io.BytesIO(to_png(many))).shape[0] > few.shape[0]


def test_foreign_names_are_printable() -> None:
    odd = Results(
        (measured("autofunc \x1b[31m[red] graph", Contender(AUTOFUNC, "x", 2, 8, 2), 1.0),), (), results().setting, "tokens"
    )  # fmt: skip
    assert "\x1b" not in odd.table() and re.search(r"\\x1b\[31m\[red\]", odd.table())
