"""Plant faults in training runs of several processes, and check the error messages and what is left behind.

    python bench/faults.py                      # every kind on both layouts, three times each
    python bench/faults.py --times 20           # takes an hour and a half on two idle cores
    python bench/faults.py --times 20 --beside 6  # several at a time, if there are cores for them
    python bench/faults.py --only hang_layer kill_worker --layouts pp2

A run passes if its message names the place of the fault, its exit status is a failure, and after ten seconds none of its
processes is left, and no file or socket in the folder of temporary files. If a run hangs, the stacks of all its processes
are shown.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from autofunc.train.forking import WORKER_NAME

MICROBATCHES, STEPS, TIMEOUT_SECONDS, LEFT_SECONDS = 4, 12, 6, 10.0
MARK = "AUTOFUNC_FAULT_RUN"
"""Environment variable by which the processes of a run are found."""

NET = """
import os, sys, time
import torch
from torch import nn
import torch.distributed as dist
import autofunc as af

KIND, RANK, STEP, MICROBATCH = os.environ["FAULT"].split(":")
AT = (int(STEP), int(MICROBATCH))


def own():
    return os.environ.get("RANK") == RANK


class Planted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bad):
        ctx.save_for_backward(x, weight)
        ctx.bad = bad
        return x * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        of_x, of_weight = grad * weight, (grad * x).sum((0, 1))
        if ctx.bad and KIND == "nan_input_gradient":
            of_x = of_x * float("nan")
        if ctx.bad and KIND == "nan_weight_gradient":
            of_weight = of_weight * float("nan")
        return of_x, of_weight, None


def act(x):
    if KIND == "hang_layer" and own():
        time.sleep(1000)
    if KIND == "hang_collective" and own():
        dist.all_reduce(torch.zeros(1))
    if KIND == "raise_layer" and own():
        raise ValueError("broken on purpose")
    if KIND == "raise_in_collective":
        if own():
            raise ValueError("broken on purpose")
        dist.all_reduce(torch.zeros(1))
    if KIND == "exit" and own():
        sys.exit(3)
    if KIND == "leave" and own():
        os._exit(137)


def layer(params, x, batch):
    try:
        bad = bool((batch["input_ids"] == 122).any())
    except Exception:  # while shapes are worked out there are no values
        bad = False
    if bad:
        act(x)
    y = Planted.apply(x, params["scale"], bad)
    return x + (y * float("nan") if bad and KIND == "nan_forward" else y).tanh()


def build():
    embed = af.Layer(
        apply=lambda params, x, batch: params["weight"][batch["input_ids"]],
        init=lambda key: {"weight": key.normal("weight", (256, 8), std=0.1)},
    )
    def block():
        return af.Layer(apply=layer, init=lambda key: {"scale": key.normal("scale", (8,), std=0.5)})
    head = af.Layer(
        apply=lambda params, x, batch: x @ params["weight"],
        init=lambda key: {"weight": key.normal("weight", (8, 256), std=0.1)},
    )
    return af.Model({"embed": embed, "a": block(), "b": block(), "head": head})


class Rows(torch.utils.data.Dataset):
    # a z stands in one microbatch of one step, for each data parallel rank
    def __init__(self, rows):
        self.rows, self.here = rows, 0

    def __len__(self):
        return self.rows * 12

    def __getitem__(self, index):
        step, row = divmod(index, self.rows)
        length = 6 if KIND == "wrong_shape" and own() and step + 1 == AT[0] else 8
        if (step + 1, row % 4) == AT and own():
            if KIND == "hang_dataset":
                time.sleep(1000)
            if KIND == "raise_dataset":
                raise ValueError("broken on purpose")
        ids = torch.arange(length) + 97
        if (step + 1, row % 4) == AT and KIND not in ("wrong_shape", "raise_dataset", "hang_dataset", "kill", "none"):
            ids[2] = 122
        return {"input_ids": ids, "labels": ids.clone()}


def rows(count):
    return Rows(count)
"""

CONFIG = """
model: {{_target_: net.py:build}}
dataset: {{_target_: net.py:rows, count: {rows}}}
dataloader: {{shuffle: false}}
step_scheduler: {{global_batch_size: {rows}, local_batch_size: 1, max_steps: {steps}}}
distributed: {{pp_size: 2, dp_size: {dp}, split_points: [b], engine: eager, step_timeout_seconds: {timeout}}}
optimizer: {{_target_: torch.optim.SGD, lr: 0.01}}
"""


@dataclass(frozen=True)
class Kind:
    """A fault.

    Args:
        said: a pattern the message must match; {rank}, {step}, {microbatch} and {signal} are filled in.
        ends: signals, one of which ends a process; drawn at random.
        whom: "worker" or "launcher" for those.
        ranks: which may have it, as pp ranks; both by default.
    """

    said: str
    ends: tuple[str, ...] = ()
    whom: str = "worker"
    ranks: tuple[int, ...] = (0, 1)


_LATE = r"rank {rank} is late[^\n]*\n(.*\n)*.*net\.py, line \d+, in "
KINDS = {
    "nan_forward": Kind(r"step {step}\b(.*\n)*.*forward: layer '[ab]'(.*\n)*.*microbatch {microbatch}\b"),
    "nan_input_gradient": Kind(r"step {step}\b(.*\n)*.*gradient(.*\n)*.*microbatch {microbatch}\b", ranks=(1,)),
    "nan_weight_gradient": Kind(r"step {step}\b(.*\n)*.*scale(.*\n)*.*microbatch {microbatch}\b"),
    "hang_layer": Kind(_LATE + "act"),
    "hang_dataset": Kind(_LATE + "__getitem__"),
    "hang_collective": Kind(r"rank {rank}: .*all_reduce(.*\n)*rank {rank} waits(.*\n)*.*net\.py, line \d+, in act"),
    "raise_layer": Kind(r"rank {rank} \(step {step}.*failed:(.*\n)*.*net\.py, line \d+(.*\n)*.*broken on purpose"),
    "raise_dataset": Kind(r"rank {rank} \(reading rows\) failed:(.*\n)*.*broken on purpose"),
    "raise_in_collective": Kind(
        r"rank {rank} \(step {step}.*failed:(.*\n)*.*broken on purpose",
        ranks=(0,),  # the second waits for the first
    ),
    "wrong_shape": Kind(r"rank {rank}: preparing a step with batch.input_ids \(1, 6\).*waits for other ranks to prepare"),
    "exit": Kind(r"rank {rank} \(step {step}.*failed:(.*\n)*.*sys\.exit\(3\)"),
    "leave": Kind(r"rank {rank} \(step {step}.*failed: .*exit code 137"),
    "kill_worker": Kind(
        r"rank {rank} \((step|after step|reading|starting|building).*\) failed: killed by {signal}",
        ("SIGTERM", "SIGINT", "SIGKILL", "SIGSEGV"),
    ),
    "kill_launcher": Kind("", ("SIGTERM", "SIGINT", "SIGKILL", "SIGHUP"), "launcher"),
}
LAYOUTS = {"pp2": (2, 1), "pp2 x dp2": (4, 2)}
"""Number of processes, and of data parallel ranks."""


@dataclass
class Outcome:
    """The outcome of a run."""

    kind: str
    layout: str
    wrong: str  # empty when all is right
    seconds: float  # from the start to the end of the last process
    said: str


def run_once(kind: str, layout: str, draw: random.Random) -> Outcome:
    """Plant one fault."""
    fault, (processes, dp) = KINDS[kind], LAYOUTS[layout]
    rank = draw.choice(fault.ranks) * dp + draw.randrange(dp)
    step, microbatch = draw.randrange(2, STEPS), draw.randrange(MICROBATCHES)
    planted = "none" if fault.ends else kind
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / "tmp"
        temporary.mkdir()
        (Path(folder) / "net.py").write_text(NET)
        steps = 10**6 if fault.ends else STEPS
        text = CONFIG.format(rows=MICROBATCHES * dp, steps=steps, dp=dp, timeout=TIMEOUT_SECONDS)
        (Path(folder) / "cfg.yaml").write_text(text)
        mark = f"{os.getpid()}-{time.monotonic_ns()}"
        environment = {
            **os.environ, MARK: mark, "FAULT": f"{planted}:{rank}:{step}:{microbatch}", "TMPDIR": str(temporary),
            "NO_COLOR": "1", "PYTHONFAULTHANDLER": "1",
        }  # fmt: skip
        began = time.monotonic()
        run = subprocess.Popen(
            [sys.executable, "-m", "autofunc", "finetune", "llm", "-c", "cfg.yaml"],
            cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        name = draw.choice(fault.ends) if fault.ends else ""
        if fault.ends:
            _end(run, Path(folder), mark, (fault.whom, rank), name, draw.uniform(0.2, 2.0), processes)
        try:
            said, _ = run.communicate(timeout=120)
            hangs = ""
        except subprocess.TimeoutExpired:
            hangs = f"it hangs; signal {name or 'none'}"
            said = _stacks(run, mark, Path(folder))
        wrong = hangs or _wrong(
            fault, said, run.returncode, {"rank": rank, "step": step, "microbatch": microbatch, "signal": name}
        )
        left = _left(mark, time.monotonic() + LEFT_SECONDS)
        if left:
            wrong += f"; {len(left)} processes are left"
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        remains = sorted(path.name for path in temporary.iterdir() if "torchinductor" not in path.name)
        if remains:
            wrong += f"; files are left: {', '.join(remains)}"
        return Outcome(kind, layout, wrong, time.monotonic() - began, said)


def _stacks(run: subprocess.Popen[str], mark: str, folder: Path) -> str:
    """End the processes of a hanging run, and return its output with the stacks of each, which SIGABRT writes."""
    by_name = sorted(_processes(mark), key=lambda process: process[1], reverse=True)
    for pid, _ in by_name:
        if pid != run.pid:
            os.kill(pid, signal.SIGABRT)
            time.sleep(0.2)  # what they write does not mix
    if run.poll() is None:
        run.send_signal(signal.SIGABRT)
    try:
        said, _ = run.communicate(timeout=LEFT_SECONDS)
    except subprocess.TimeoutExpired:  # a process that ignores it keeps the pipe open
        run.kill()
        for pid, _ in _processes(mark):
            os.kill(pid, signal.SIGKILL)
        said, _ = run.communicate()
    logs = [f"{path.name}:\n{path.read_text(errors='replace')[-6000:]}" for path in sorted(folder.rglob("rank_*.log"))]
    return "\n".join([f"processes: {by_name}", said, *logs])


def _wrong(fault: Kind, said: str, status: int, values: dict[str, object]) -> str:
    if fault.whom == "launcher":
        return "" if status != 0 else "the launcher ended with status 0"
    pattern = fault.said
    for name, value in values.items():
        pattern = pattern.replace("{" + name + "}", str(value))
    if status == 0 or not re.search(pattern, said):
        return f"status {status}, {values}"
    lines = said[said.rfind("error:") :].count("\n")
    return f"{lines} lines" if lines > 60 else ""


def _end(
    run: subprocess.Popen[str], folder: Path, mark: str, whom: tuple[str, int], name: str, after: float, processes: int
) -> None:
    """Wait until all processes run steps, then send one a signal."""
    until = time.monotonic() + 90
    while time.monotonic() < until:
        names = [(pid, name.removeprefix(WORKER_NAME)) for pid, name in _processes(mark) if name.startswith(WORKER_NAME)]
        workers = {int(rank): pid for pid, rank in names}
        written = any(file.stat().st_size for file in folder.rglob("metrics.jsonl"))
        if len(workers) == processes and written:
            time.sleep(after)
            os.kill(workers[whom[1]] if whom[0] == "worker" else run.pid, getattr(signal, name))
            return
        time.sleep(0.1)


def _processes(mark: str) -> Iterator[tuple[int, str]]:
    """Return the processes of a run, with their names."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
            name = (entry / "comm").read_text().strip()
        except OSError:  # it has ended, or is another user's
            continue
        if f"{MARK}={mark}" in words:
            yield int(entry.name), name


def _left(mark: str, until: float) -> list[int]:
    """Return the processes of a run that are left when the time is up."""
    while True:
        left = [pid for pid, _ in _processes(mark)]
        if not left or time.monotonic() > until:
            return left
        time.sleep(0.2)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=3, help="of each kind on each layout (default 3)")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), metavar="LAYOUT")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--beside", type=int, default=1, help="how many runs at a time (default 1)")
    parser.add_argument("--show", action="store_true", help="what each run says, right or wrong")
    options = parser.parse_args()
    for number in (
        signal.SIGINT,
        signal.SIGHUP,
    ):  # which a shell has its background ignore, and so would all that is started
        signal.signal(number, signal.SIG_DFL)
    console = Console()
    planned = [
        (kind, layout, number) for kind in options.only for layout in options.layouts for number in range(options.times)
    ]
    outcomes = []
    with ThreadPoolExecutor(options.beside) as runs:
        done = runs.map(lambda one: run_once(one[0], one[1], random.Random(f"{options.seed}: {one}")), planned)
        for outcome in track(done, total=len(planned), console=console, description="faults"):
            outcomes.append(outcome)
            if outcome.wrong or options.show:
                shown = outcome.said[-20_000:] if "hangs" in outcome.wrong else outcome.said[-3000:]
                console.print(
                    f"{outcome.kind} on {outcome.layout}: {outcome.wrong}\n{shown}", markup=False, highlight=False
                )
    table = Table("fault", *options.layouts, "seconds, median")
    for kind in options.only:
        of_kind = [outcome for outcome in outcomes if outcome.kind == kind]
        cells = []
        for layout in options.layouts:
            each = [outcome for outcome in of_kind if outcome.layout == layout]
            cells.append(f"{sum(not outcome.wrong for outcome in each)} of {len(each)}")
        seconds = sorted(outcome.seconds for outcome in of_kind)
        table.add_row(kind, *cells, f"{seconds[len(seconds) // 2]:.1f}")
    console.print(table)
    sys.exit(any(outcome.wrong for outcome in outcomes))


if __name__ == "__main__":
    main()
