"""A worker ends as a Python process does, except for the interpreter's teardown."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORKER = """
import atexit, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from autofunc.train.worker import run_worker

left, pool = Path("left").open("w"), ThreadPoolExecutor(1)

def slowly():
    time.sleep(0.3)
    Path("thread").write_text("done")

class Noisy:
    def __del__(self):
        sys.stdout.write("taken apart")

noisy = Noisy()

def work():
    left.write("written")
    pool.submit(time.sleep, 0)
    threading.Thread(target=slowly).start()
    atexit.register(Path("atexit").write_text, "done")
    sys.stdout.write("no newline")

run_worker(work)
"""


def test_open_files_are_flushed(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", WORKER], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "no newline"), done.stderr
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "left": "written",
        "thread": "done",
        "atexit": "done",
    }
