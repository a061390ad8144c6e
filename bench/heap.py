"""How long does a CPU step take when freed memory stays with the process, and when glibc gives it back to the system?

The model of `demo_gpt2.py` on two gloo processes with one thread each. Both ways take turns, each time in new
processes; figures are of the rank with most.

Run: make bench, or python bench/heap.py --rounds 1
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import argparse
import pickle
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from demo_gpt2 import MICROBATCHES, demo_gpt2
from machine import describe_machine
from rich.console import Console
from rich.progress import track
from rich.table import Table

import autofunc as af

RANKS, WARM, STEPS = 2, 3, 7
GLIBCS_OWN = "glibc.malloc.perturb=0"  # tunes nothing, and thereby asks autofunc to tune nothing either

Found = dict[str, tuple[float, float]]
"""By schedule: milliseconds and page faults of a step; by "": MiB of the process at its peak and at the end."""


def measure(rank: int, folder: str, compiled: bool) -> None:
    """One of two processes; the first writes what was found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
    mesh = af.make_mesh(pp=RANKS, device_type="cpu")
    model, batch = demo_gpt2()
    found: Found = {}
    for name in af.schedule.names():
        s = af.schedule.build(name, num_ranks=RANKS, num_microbatches=MICROBATCHES)
        pipe = af.pipeline(af.split(model, s.num_stages), s, loss=af.losses.causal_lm, mesh=mesh, compile=compiled)
        params, step = pipe.init(), af.value_and_grad(pipe)
        times, faults = [], []
        for _ in range(WARM + STEPS):
            dist.barrier()
            began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            step(params, batch)
            times.append((time.perf_counter() - began) * 1e3)
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        found[name] = statistics.median(times[WARM:]), statistics.median(faults[WARM:])
        pipe.close()
    found[""] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, resident_mib()
    of_all: list[Found] = [{}] * RANKS
    dist.all_gather_object(of_all, found)
    if rank == 0:
        most = {name: tuple(max(column) for column in zip(*(each[name] for each in of_all), strict=True)) for name in found}
        Path(folder, "found").write_bytes(pickle.dumps(most))
    dist.barrier()
    dist.destroy_process_group()


def resident_mib() -> float:
    """Return how much of this process is in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def in_new_processes(compiled: bool) -> Found:
    """Measure all schedules in two new processes, with this environment."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(measure, (folder, compiled), RANKS)  # type: ignore[no-untyped-call]
        found: Found = pickle.loads(Path(folder, "found").read_bytes())
        return found


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--compile", action="store_true")
    given = options.parse_args()
    kept: list[Found] = []
    returned: list[Found] = []
    for way in track([kept, returned] * given.rounds, "processes", transient=True):
        os.environ |= {"GLIBC_TUNABLES": GLIBCS_OWN} if way is returned else {}
        way.append(in_new_processes(given.compile))
        os.environ.pop("GLIBC_TUNABLES", None)
    console = Console()
    console.print(describe_machine())
    table = Table("schedule", "kept ms", "glibc's ms", "glibc's / kept", "least, most", "faults", title="a step; medians")
    for name in af.schedule.names():
        pairs = [(a[name][0], b[name][0]) for a, b in zip(kept, returned, strict=True)]
        ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratios = sorted(b / a for a, b in pairs)
        faults = " / ".join(f"{statistics.median(each[name][1] for each in way):,.0f}" for way in (kept, returned))
        spread = f"{ratios[0]:.2f}, {ratios[-1]:.2f}"
        table.add_row(name, f"{ours:.1f}", f"{theirs:.1f}", f"{statistics.median(ratios):.2f}", spread, faults)
    console.print(table)
    for figure, when in enumerate(("at its peak", "when all pipelines are closed")):
        sizes = [statistics.median(each[""][figure] for each in way) for way in (kept, returned)]
        console.print(f"a process {when}: {sizes[0]:,.0f} MiB kept, {sizes[1]:,.0f} MiB by glibc's own thresholds")


if __name__ == "__main__":
    main()
