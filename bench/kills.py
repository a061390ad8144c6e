"""Kill workers of training runs at random, also during a save, and check that the runs end like undisturbed ones.

    python bench/kills.py                  # 20 kills at random steps and 20 during a save, about ten minutes
    python bench/kills.py --kills 5 --layouts pp2

A run is started with --max-restarts; workers are killed with SIGKILL, one after the other, each after the run has resumed.
It passes if it ends with status 0, its losses and weights equal those of the undisturbed run bit for bit, and every
checkpoint that was published before a kill could be read as a whole.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch.distributed.checkpoint as dcp
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import empty
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from autofunc.checkpoint.folder import read_extra, read_metadata
from autofunc.checkpoint.write import hush
from autofunc.train.forking import WORKER_NAME

STEPS, EVERY, LONGEST_SECONDS = 200, 3, 600.0
CONFIG = """
model: {{_target_: stages.gpt2.build_gpt2_model, vocab_size: 256, n_positions: 16, n_embd: 64, n_layer: 4, n_head: 2}}
dataset: {{_target_: autofunc.data.TextFolder, path: corpus, seq_len: 16}}
step_scheduler: {{global_batch_size: 8, local_batch_size: 1, max_steps: {steps}, ckpt_every_steps: {every}}}
checkpoint: {{is_async: {is_async}}}
distributed: {{pp_size: 2, dp_size: {dp}, split_points: [h.2], engine: eager, device: cpu}}
optimizer: {{_target_: torch.optim.AdamW, lr: 1e-3}}
"""
LAYOUTS = {"pp2": 1, "pp2 x dp2": 2}
"""Data parallel ranks by layout."""


def start(folder: Path, name: str, restarts: int) -> subprocess.Popen[str]:
    """Start a run."""
    words = ["-m", "autofunc", "finetune", "llm", "-c", "cfg.yaml", "--output_dir", name, "--max-restarts", str(restarts)]
    environment = {**os.environ, "NO_COLOR": "1"}
    with (folder / f"{name}.log").open("w") as log:
        return subprocess.Popen([sys.executable, *words], cwd=folder, env=environment, stdout=log, stderr=log, text=True)


def workers_of(launcher: int) -> list[int]:
    """Return the workers of a run: the children of its only child."""
    found = []
    for child in _children(launcher):
        for pid in _children(child):
            try:
                if Path(f"/proc/{pid}/comm").read_text().startswith(WORKER_NAME):
                    found.append(pid)
            except OSError:  # it has just ended
                continue
    return found


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def losses(folder: Path, name: str) -> dict[int, float]:
    """Return the losses of a run by step."""
    file = folder / name / "metrics.jsonl"
    found = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            values = json.loads(line)
            found[values["step"]] = values["loss"]
        except ValueError:  # half a line of a process that was killed
            continue
    return found


def disturb(run: subprocess.Popen[str], folder: Path, name: str, kills: int, during_save: bool, draw: random.Random) -> int:
    """Kill workers of a run, each some steps after the previous kill; return how many."""
    checkpoints, until = folder / name / "checkpoints", time.monotonic() + LONGEST_SECONDS
    done, number, killed, wanted = 0, 0, set[int](), 0
    while done < kills and run.poll() is None and time.monotonic() < until:
        workers = workers_of(run.pid)
        number = max(number, len(workers))
        step = max(losses(folder, name), default=0)
        is_saving = not during_save or any(checkpoints.glob("*.partial"))
        if not killed & set(workers) and len(workers) == number and step >= max(wanted, 1) and is_saving:
            os.kill(draw.choice(workers), signal.SIGKILL)
            done, killed, wanted = done + 1, set(workers), step + draw.randrange(1, STEPS // kills)
            while run.poll() is None and set(workers_of(run.pid)) & killed:  # until all of these have ended
                time.sleep(0.01)
            for path in checkpoints.glob("step_*"):
                assert is_readable(path), path
        time.sleep(0.002)
    return done


def is_readable(path: Path) -> bool:
    """Return whether all tensors of a checkpoint can be read, unless it is still being written."""
    if path.suffix == ".partial":
        return True
    hush()
    read_extra(path)
    entries = read_metadata(path).state_dict_metadata
    wanted = {
        name: empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(wanted, checkpoint_id=path, no_dist=True)
    return bool(wanted)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each kind, over all layouts (default 20)")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), metavar="LAYOUT")
    parser.add_argument("--is-async", action="store_true", help="checkpoints are written while training goes on")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, console = random.Random(options.seed), Console()
    table = Table("layout", "killed", "kills", "status", "losses", "weights")
    wrong = False
    with Progress(console=console) as bar:
        task = bar.add_task("kills", total=2 * options.kills)
        for layout in options.layouts:
            with tempfile.TemporaryDirectory() as made:
                folder = Path(made)
                (folder / "corpus").mkdir()
                (folder / "corpus" / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
                is_async = str(options.is_async).lower()
                text = CONFIG.format(steps=STEPS, every=EVERY, dp=LAYOUTS[layout], is_async=is_async)
                (folder / "cfg.yaml").write_text(text)
                assert start(folder, "undisturbed", 0).wait() == 0, (folder / "undisturbed.log").read_text()[-2000:]
                expected = losses(folder, "undisturbed")
                for during_save in (False, True):
                    name, kills = ("saving" if during_save else "steps"), options.kills // len(options.layouts)
                    run = start(folder, name, kills)
                    done = disturb(run, folder, name, kills, during_save, draw)
                    status = run.wait(LONGEST_SECONDS)
                    bar.advance(task, kills)
                    same_losses = losses(folder, name) == expected
                    weights = [folder / each / "model.safetensors" for each in ("undisturbed", name)]
                    same_weights = (
                        all(each.exists() for each in weights) and len({each.read_bytes() for each in weights}) == 1
                    )
                    when = "during a save" if during_save else "at a random step"
                    same = ["same bits" if each else "DIFFER" for each in (same_losses, same_weights)]
                    table.add_row(layout, when, f"{done} of {kills}", str(status), *same)
                    if status or not (same_losses and same_weights) or done != kills:
                        wrong = True
                        console.print((folder / f"{name}.log").read_text()[-3000:], markup=False, highlight=False)
    console.print(table)
    sys.exit(wrong)


if __name__ == "__main__":
    main()
