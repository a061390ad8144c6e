"""How much better is a searched schedule than the best named one, and how far is it from the lower bound?

Random instances: 2 to 8 ranks, up to 32 microbatches, stages of unequal costs, communication, and room for p to 2p
activations. Every result is validated and measured by the simulator. Then the 1.5B model of the zero-bubble
paper (arXiv 2401.10241, tables of section 5; its figures as recalled from the paper).

Run: make bench, or python bench/schedule_search.py --instances 50 --seconds 1 --paper-seconds 0
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from typing import NamedTuple

from rich.console import Console
from rich.progress import track
from rich.table import Table

from autofunc import schedule
from autofunc.schedule.named.registry import named_candidates

PAPER_COSTS = schedule.Costs(F=18.522, I=18.086, W=9.337, comm=0.601)
PAPER_MEMORY = schedule.Memory(residuals=34 + 5 * 16 * 1024 / 2304, weight_residuals=32)
"""Table 1: F keeps s b (34 h + 5 a s) bytes, W needs 32 s b h of them; a=16, s=1024, h=2304. In units of s b h."""
PUBLISHED = {1: {24: 0.159, 32: 0.124, 64: 0.067}, 2: {24: 0.043, 32: 0.004, 64: 0.003}}


class Outcome(NamedTuple):
    """One instance."""

    ratio: float  # searched / best named
    gap: float  # searched / bound that no schedule can beat - 1
    took_s: float


def random_instance(rng: random.Random, seconds: float) -> Outcome:
    """Draw costs and a cap, search, and compare."""
    p = rng.randint(2, 8)
    m = rng.randint(p, 32)
    f, i, w = ([rng.uniform(0.5, 2.0) for _ in range(p)] for _ in range(3))
    costs = schedule.Costs(f, i, w, comm=rng.uniform(0, 0.3))
    limit = rng.randint(p, 2 * p)
    began = time.perf_counter()
    found = schedule.search(
        costs, num_ranks=p, num_microbatches=m, memory_limit=limit, time_limit_s=seconds, seed=rng.randrange(2**31)
    )
    took_s = time.perf_counter() - began
    schedule.validate(found)
    timeline = schedule.simulate(found, costs)
    assert max(timeline.peak_activations) <= limit
    named = [schedule.simulate(candidate, costs) for candidate in named_candidates(p, m, 1)]
    best_named = min(each.makespan for each in named if max(each.peak_activations) <= limit)
    bound = schedule.lower_bound(costs, num_ranks=p, num_microbatches=m, memory_limit=limit)
    return Outcome(timeline.makespan / best_named, timeline.makespan / bound - 1, took_s)


def paper(console: Console, seconds: float) -> None:
    """Bubble rates of the 1.5B model by the paper's measure: 1 - busy / longest span of a rank."""
    table = Table("micro-\nbatches", "cap", "published", "searched, activations", "bound", "searched, bytes", "bound")
    per_microbatch = PAPER_COSTS.F + PAPER_COSTS.I + PAPER_COSTS.W
    for m in (24, 32, 64):
        for caps in (1, 2):
            cells = []
            for memory, one in ((None, 1.0), (PAPER_MEMORY, PAPER_MEMORY.residuals)):
                given = {"num_ranks": 8, "num_microbatches": m, "memory_limit": 8 * caps * one, "objective": "span"}
                found = schedule.search(PAPER_COSTS, **given, memory=memory, time_limit_s=seconds)
                schedule.validate(found)
                rate = schedule.simulate(found, PAPER_COSTS).span_bubble_fraction
                bound = 1 - m * per_microbatch / schedule.lower_bound(PAPER_COSTS, **given, memory=memory)
                cells += [f"{rate:.4f}", f"{bound:.4f}"]
            table.add_row(str(m), f"{caps}p", f"{PUBLISHED[caps][m]:.3f}", *cells)
    console.print(table)


def main() -> None:
    """Print both tables."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--instances", type=int, default=500, help="random instances")
    options.add_argument("--seconds", type=float, default=2.0, help="time limit of each search")
    options.add_argument(
        "--paper-seconds", type=float, default=30.0, help="time limit of each of the paper's; 0: skip them"
    )
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    console, rng = Console(), random.Random(given.seed)
    outcomes = [
        random_instance(rng, given.seconds) for _ in track(range(given.instances), "random instances", transient=True)
    ]
    ratios = [outcome.ratio for outcome in outcomes]
    console.print(f"{len(outcomes)} instances, at most {max(outcome.took_s for outcome in outcomes):.2f} s each")
    console.print(f"worse than the best named: {sum(ratio > 1 + 1e-9 for ratio in ratios)}")
    console.print(f"better by more than 1 %:   {sum(ratio < 0.99 for ratio in ratios)}")
    console.print(f"searched / best named:     median {statistics.median(ratios):.4f}, least {min(ratios):.4f}")
    gaps = [outcome.gap for outcome in outcomes]
    console.print(f"above the bound:           median {statistics.median(gaps):.2%}, most {max(gaps):.2%}")
    if given.paper_seconds:
        paper(console, given.paper_seconds)


if __name__ == "__main__":
    main()
