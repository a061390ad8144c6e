"""How long does the command line take to start? Wall and CPU seconds, medians.

    python bench/startup.py
    python bench/startup.py --against ../other_checkout     # both in turns, and the ratio of each pair

CPU seconds are of all processes together, and depend less than wall seconds on the machine's load. Bytecode is written
first, as in an installed package. `finetune` trains a tiny model on two ranks; its time to the first step is the one that
`AUTOFUNC_TIMING=1` prints.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
NET = """
import torch
import autofunc as af


def build():
    layers = {"embed": af.Layer(
        apply=lambda params, x, batch: params["weight"][batch["input_ids"]],
        init=lambda key: {"weight": key.normal("weight", (256, 8), std=0.1)},
    )}
    for name in "ab":
        layers[name] = af.Layer(
            apply=lambda params, x, batch: x + (x * params["scale"]).tanh(),
            init=lambda key: {"scale": key.normal("scale", (8,), std=0.5)},
        )
    layers["head"] = af.Layer(
        apply=lambda params, x, batch: x @ params["weight"],
        init=lambda key: {"weight": key.normal("weight", (8, 256), std=0.1)},
    )
    return af.Model(layers)


def rows():
    return [{"input_ids": torch.arange(8) + row % 40, "labels": torch.arange(8) + row % 40} for row in range(48)]
"""
CONFIG = """
model: {_target_: net.py:build}
dataset: {_target_: net.py:rows}
step_scheduler: {global_batch_size: 4, local_batch_size: 1, max_steps: 12}
distributed: {pp_size: 2, split_points: [b], device: cpu}
optimizer: {_target_: torch.optim.SGD, lr: 0.01}
"""
DEMO = ["-c", str(ROOT / "examples" / "demo.yaml")]
COMMANDS = {
    "import autofunc": ["-c", "import autofunc"],
    "autofunc --help": ["-m", "autofunc", "--help"],
    "autofunc check, demo": ["-m", "autofunc", "check", *DEMO],
    "autofunc plan, demo": ["-m", "autofunc", "plan", *DEMO],
    "autofunc finetune, tiny": ["-m", "autofunc", "finetune", "llm", "-c", "cfg.yaml"],
}
FIRST_STEP = re.compile(r"rank 0 +([\d.]+) s .* the first step")


@dataclass(frozen=True)
class Took:
    """Seconds of one run."""

    wall: float
    cpu: float
    first_step: float | None


def run(words: Sequence[str], checkout: Path) -> Took:
    """Run a command of a checkout, in an empty folder."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "AUTOFUNC_TIMING": "1", "NO_COLOR": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "net.py").write_text(NET)
        (Path(folder) / "cfg.yaml").write_text(CONFIG)
        before, began = os.times(), time.perf_counter()
        done = subprocess.run(
            [sys.executable, *words], cwd=folder, env=environment, check=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        wall, after = time.perf_counter() - began, os.times()
    cpu = after.children_user - before.children_user + after.children_system - before.children_system
    told = FIRST_STEP.search(done.stdout)
    return Took(wall, cpu, float(told[1]) if told else None)


def described(runs: Sequence[Took]) -> list[str]:
    """Return medians as cells of a table."""
    firsts = [each.first_step for each in runs if each.first_step is not None]
    return [
        f"{statistics.median(each.wall for each in runs):.2f}",
        f"{statistics.median(each.cpu for each in runs):.2f}",
        f"{statistics.median(firsts):.2f}" if firsts else "",
    ]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5, help="of each (default 5)")
    parser.add_argument("--against", type=Path, help="another checkout")
    options = parser.parse_args()
    checkouts = [ROOT] if options.against is None else [options.against.resolve(), ROOT]
    table = Table("seconds, medians", "checkout", "wall", "CPU", "to the first step", "here / there: wall, CPU")
    for name, words in COMMANDS.items():
        for checkout in checkouts:
            run(words, checkout)  # writes bytecode, and brings files into memory
        pairs = [[run(words, checkout) for checkout in checkouts] for _ in range(options.times)]
        for number, which in enumerate(zip(*pairs, strict=True)):
            ratios = [(here.wall / there.wall, here.cpu / max(there.cpu, 0.01)) for there, here in pairs] if number else []
            ratio = ", ".join(f"{statistics.median(each):.2f}" for each in zip(*ratios, strict=True))
            where = "here" if checkouts[number] is ROOT else "there"
            table.add_row("" if number else name, where, *described(which), ratio)
    console = Console()
    console.print(table)
    console.print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores", highlight=False)


if __name__ == "__main__":
    main()
