"""How long does it take to build, validate and simulate large schedules? One core, no torch; CPU time, not wall time.

Draws time against size to bench/schedule_scale.svg.

Run: make bench, or python bench/schedule_scale.py --largest 256
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import matplotlib
from rich.console import Console
from rich.progress import track
from rich.table import Table

from autofunc import schedule

matplotlib.use("svg")
import matplotlib.pyplot as plt

NAMES = ("1f1b", "zb_h1", "interleaved_1f1b", "zbv", "v_half", "v_min", "dualpipe_v")


def measure(name: str, ranks: int, microbatches: int) -> tuple[int, float, float, float]:
    """Return (number of actions, CPU seconds to build, to validate, to simulate)."""
    began = time.process_time()
    s = schedule.build(name, num_ranks=ranks, num_microbatches=microbatches)
    built = time.process_time()
    schedule.validate(s)
    validated = time.process_time()
    schedule.simulate(s)
    return sum(map(len, s)), built - began, validated - built, time.process_time() - validated


def main() -> None:
    """Print the table and draw the plot."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--largest", type=int, default=1024, help="ranks of the largest; four times as many microbatches")
    largest = options.parse_args().largest
    sizes = [ranks for ranks in (4, 16, 64, 256, 1024) if ranks <= largest]
    console = Console()
    table = Table("schedule", "ranks", "micro-\nbatches", "actions", "build s", "validate s", "simulate s", "all s")
    figure, axes = plt.subplots(figsize=(6.4, 4))
    for name in NAMES:
        points = []
        for ranks in track(sizes, name, transient=True):
            actions, *seconds = measure(name, ranks, 4 * ranks)
            points.append((actions, sum(seconds)))
            table.add_row(
                name, str(ranks), str(4 * ranks), f"{actions:,}", *(f"{each:.3f}" for each in (*seconds, sum(seconds)))
            )
        axes.loglog(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xlabel="actions", ylabel="seconds of a core to build, validate and simulate")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})
    console.print(table)
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    console.print(f"peak memory of this process: {peak_gb:.2f} GB")
    row = Table("one rank of 1,024, 4,096 microbatches", "build s")
    for name in schedule.names():
        began = time.perf_counter()
        schedule.build_row(name, rank=511, num_ranks=1024, num_microbatches=4096)
        row.add_row(name, f"{time.perf_counter() - began:.3f}")
    console.print(row)


if __name__ == "__main__":
    main()
