"""At which sizes is which matrix product kernel faster on this CPU? The basis of `autofunc/engine/matmul.py`.

fp32, one thread, medians, kernels in turn. F: `addmm` against oneDNN's linear; I: `mm` against the same; W: a product added
to an accumulator against `addmm_` into it.

Run: python bench/matmul_kernels.py
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from machine import describe_machine
from rich.console import Console
from rich.progress import track
from rich.table import Table

from autofunc.engine.matmul import LARGE

SIZES = (  # rows, inputs, outputs
    (32, 64, 64), (32, 64, 256), (64, 128, 512), (128, 128, 512), (128, 256, 1024), (512, 192, 192), (512, 192, 768),
    (128, 768, 768), (32, 768, 3072), (128, 768, 3072), (128, 3072, 768), (1024, 512, 2048),
)  # fmt: skip


def ratio(first: Callable[[], Any], second: Callable[[], Any], repetitions: int) -> tuple[float, float]:
    """(median us of the first, median of first / second), taking turns."""
    times: list[tuple[float, float]] = []
    for _ in range(repetitions + 3):
        marks = [time.perf_counter()]
        for call in (first, second):
            call()
            marks.append(time.perf_counter())
        times.append((marks[1] - marks[0], marks[2] - marks[1]))
    return statistics.median(a for a, _ in times[3:]) * 1e6, statistics.median(a / b for a, b in times[3:])


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    console = Console()
    console.print(describe_machine())
    linear = torch.ops.mkldnn._linear_pointwise
    table = Table(
        "rows x in x out", "x 2^24", "F us", "F ratio", "I us", "I ratio", "W us", "W ratio", title="MKL / chosen"
    )
    for rows, columns, width in track(SIZES, "sizes", transient=True):
        x, w, b = torch.randn(rows, columns), torch.randn(width, columns), torch.randn(width)
        g, total = torch.randn(rows, width), torch.zeros(width, columns)
        work = rows * columns * width
        repetitions = 300 if work < 1e7 else 31
        pairs = (
            (lambda x=x, w=w, b=b: torch.addmm(b, x, w.t()), lambda x=x, w=w, b=b: linear(x, w, b, "none", [], "")),
            (lambda g=g, w=w: torch.mm(g, w), lambda g=g, w=w: linear(g, w.t(), None, "none", [], "")),
            (lambda x=x, g=g, t=total: t.add_(torch.mm(g.t(), x)), lambda x=x, g=g, t=total: t.addmm_(g.t(), x)),
        )
        cells: list[str] = []
        for first, second in pairs:
            us, faster = ratio(first, second, repetitions)
            cells += [f"{us:.0f}", f"{faster:.2f}"]
        table.add_row(f"{rows} x {columns} x {width}", f"{work / LARGE:.2f}", *cells)
    console.print(table)


if __name__ == "__main__":
    main()
