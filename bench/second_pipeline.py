"""How long does a pipeline take to build, and a second one on the same stages, which reuses the first one's results?

GPT-2 (124 million parameters, 12 blocks) in 4 stages, 8 microbatches of one row of 128 tokens; one process, no weights.

Run: make bench, or python bench/second_pipeline.py
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
from transformers import GPT2Config, GPT2LMHeadModel

import autofunc as af
from autofunc import cache
from stages.gpt2 import build_gpt2_model

REPETITIONS = 5
POINTS = ["h.3", "h.6", "h.9"]


def build_ms(stages: list[Any], schedule: str, batch: dict[str, torch.Tensor], loss: Any) -> float:
    """Return the wall time of creating a pipeline and building it for the batch."""
    s = af.schedule.build(schedule, num_ranks=4, num_microbatches=8)
    began = time.perf_counter()
    af.pipeline(stages, s, loss=loss).build(batch)
    return (time.perf_counter() - began) * 1e3


def captured() -> af.Model:
    """Return GPT-2 of transformers, captured without weights."""
    with af.empty_weights():
        module = GPT2LMHeadModel(GPT2Config())
    ids = torch.zeros(1, 128, dtype=torch.int64)
    return af.from_module(module, {"input_ids": ids, "labels": ids})


def main() -> None:
    """Print one table."""
    torch.set_num_threads(1)
    console = Console()
    console.print(describe_machine())
    ids = torch.randint(0, 50257, (8, 128))
    batch = {"input_ids": ids, "labels": ids}
    makers: dict[str, tuple[Callable[[], af.Model], Any]] = {
        "stages/gpt2.py": (lambda: build_gpt2_model(n_layer=12), af.losses.causal_lm),
        "transformers, captured": (captured, None),
    }
    columns = ("first ms", "same again ms", "zb_h1 after it ms", "same / first")
    table = Table("model", *columns, title="a pipeline of 4 stages, built; medians")
    for name, (make, loss) in makers.items():
        rows = []
        for _ in track(range(REPETITIONS), name, transient=True):
            cache.shared.clear()
            stages = af.split(make(), POINTS)
            first, again = (build_ms(stages, "1f1b", batch, loss) for _ in range(2))
            rows.append((first, again, build_ms(stages, "zb_h1", batch, loss), again / first))
        *times, ratio = (statistics.median(column) for column in zip(*rows, strict=True))
        table.add_row(name, *(f"{each:.0f}" for each in times), f"{ratio:.1%}")
    console.print(table)


if __name__ == "__main__":
    main()
