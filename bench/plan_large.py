"""How long does `autofunc plan` take for models of billions of parameters, and how much memory?

Each configuration of `bench/plans/` is planned in a separate process, without weights, data or further processes. Shown are
its output, then seconds (wall and CPU) and the process's peak memory.

Run: python bench/plan_large.py [a.yaml ...]
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from machine import describe_machine
from rich.console import Console
from rich.table import Table

PLANS = Path(__file__).parent / "plans"


def planned(path: Path) -> tuple[str, float, float, int]:
    """Run `autofunc plan`; return its output, wall seconds, CPU seconds, and peak bytes of memory."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "autofunc", "plan", "-c", str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"autofunc plan -c {path} ended with {process.returncode}")
    kilobytes = used.ru_maxrss // 1024 if sys.platform == "darwin" else used.ru_maxrss
    return printed, time.perf_counter() - began, used.ru_utime + used.ru_stime, kilobytes * 1024


def main() -> None:
    """Measure and print."""
    table = Table("plan", "seconds", "of the processor", "peak GB", title=describe_machine())
    for path in [Path(word) for word in sys.argv[1:]] or sorted(PLANS.glob("*.yaml")):
        printed, seconds, of_processor, most = planned(path)
        sys.stdout.write(f"{path.name}\n{printed}\n")
        table.add_row(path.stem, f"{seconds:.1f}", f"{of_processor:.1f}", f"{most / 1e9:.2f}")
    console = Console(width=120)
    console.print(table)
    console.print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
