"""`autofunc finetune llm` in real processes: layouts agree, torchrun works, a dying worker ends the run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from autofunc import schedule
from autofunc.train.speed import MEASURED
from tests.cases import assert_same_tree
from tests.cli.here import run_here

ROOT = Path(__file__).parent.parent.parent

CONFIG = """
model:
  _target_: stages.gpt2.build_gpt2_model
  vocab_size: 256
  n_positions: 16
  n_embd: 16
  n_layer: 2
  n_head: 2
  resid_pdrop: 0.1
dataset: {_target_: autofunc.data.TextFolder, path: corpus, seq_len: 16}
validation_dataset: {_target_: autofunc.data.TextFolder, path: corpus, seq_len: 16, split: validation}
step_scheduler: {global_batch_size: 8, local_batch_size: 2, max_steps: 6, val_every_steps: 4}
distributed: {strategy: fsdp2, pp_size: 2, split_points: [h.1], schedule: 1f1b, tp_size: 1}
optimizer: {_target_: torch.optim.AdamW, lr: 1e-2}
"""

EXPERTS = """
model:
  _target_: stages.moe.build_moe_model
  vocab_size: 256
  hidden_size: 16
  intermediate_size: 24
  num_hidden_layers: 2
  num_attention_heads: 2
  num_key_value_heads: 2
  num_local_experts: 4
loss_fn: {_target_: stages.moe.moe_causal_lm, router_aux_loss_coef: 0.0}
dataset: {_target_: autofunc.data.TextFolder, path: corpus, seq_len: 16}
step_scheduler: {global_batch_size: 8, local_batch_size: 2, max_steps: 4}
distributed: {pp_size: 2, split_points: [layers.1]}
optimizer: {_target_: torch.optim.AdamW, lr: 1e-2}
"""

DYING = """
import os, signal, time
import autofunc as af
from stages.gpt2 import build_gpt2_model

def build(how, **sizes):
    model = build_gpt2_model(**sizes)
    block, calls = model.layers["h.1"], []

    def apply(params, x, batch):
        calls.append(1)
        if os.environ.get("RANK") == "1" and len(calls) > 14:
            with open("died-" + how, "w") as file:
                file.write(str(time.time()))
            if how.startswith("SIG"):
                os.kill(os.getpid(), getattr(signal, how))
                time.sleep(60)
            if how == "left":
                os._exit(137)
            if how == "exit":
                raise SystemExit(3)
            raise ValueError("broken on purpose")
        return block.apply(params, x, batch)

    model.layers["h.1"] = af.Layer(apply=apply, init=block.init)
    return model
"""


def start(
    folder: Path,
    *words: str,
    program: tuple[str, ...] = ("-m", "autofunc"),
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, *program, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def computed(line: dict[str, Any]) -> dict[str, Any]:
    """Drop values that depend on the machine's speed."""
    return {name: value for name, value in line.items() if name not in MEASURED}


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder) if "loss" in line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a corpus and a configuration, and the run that the others are compared with."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "cfg.yaml").write_text(CONFIG)
    (folder / "dying.py").write_text(DYING)
    (folder / "einops.py").write_text("raise RuntimeError('files here must not hide installed packages')")
    (folder / "corpus").mkdir()
    (folder / "corpus" / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 100)
    return folder


@pytest.fixture(scope="module")
def two_processes(folder: Path) -> subprocess.CompletedProcess[str]:
    return start(folder, "finetune", "llm", "-c", "cfg.yaml")


def test_trains_on_two_processes(folder: Path, two_processes: subprocess.CompletedProcess[str]) -> None:
    assert two_processes.returncode == 0, two_processes.stderr
    assert two_processes.stderr == ""
    out = two_processes.stdout
    assert "stage 1 on rank 1: h.1 .. head" in out and "rank 1 | ..0 [0 ]1 [1 ]2 [2 ]3 [3 ]....\n" in out
    assert "dataset: no tokenizer named, so tokens are bytes" in out
    lines = metrics(folder / "runs" / "cfg")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "validation_loss" in line] == [4, 6]
    assert lines[0]["num_tokens"] == 128 and lines[0]["step_time_ms"] > 0
    assert lines[-1]["validation_loss"] < lines[0]["loss"], "it learns"
    assert out.count("validation loss: ") == 2, "each once"
    assert "tokens/s" in out and out.count("bubble") == out.count(", bubble ") + out.count("  measured bubble ") == 2
    measured = {line["step"]: line["bubble_fraction"] for line in lines if "bubble_fraction" in line}
    assert list(measured) == [6] and 0 < measured[6] < 1, "in the last step, and every fiftieth"
    assert out.splitlines()[-1] == f"validation loss: {lines[-1]['validation_loss']:.4f}"
    assert (folder / "runs" / "cfg" / "loss.png").read_bytes().startswith(b"\x89PNG")
    logs = [(folder / "runs" / "cfg" / "logs" / f"rank_{rank}.log").read_text().splitlines() for rank in (0, 1)]
    assert logs[0][-1] == out.splitlines()[-1] and len(logs[1]) == 1, "the other rank has said nothing"
    assert "As predicted" not in (folder / "runs" / "cfg" / "run.html").read_text(), "it was measured"
    wide = [line for line in out.splitlines() if len(line) > 80 and str(folder) not in line]
    assert not wide, "only paths are longer than a line"


def test_one_process_gives_the_same(folder: Path, two_processes: subprocess.CompletedProcess[str]) -> None:
    done = run_here(folder, "finetune", "llm", "-c", "cfg.yaml", "--distributed.pp_size", "1", "--output_dir", "alone")
    assert done.status == 0, done.err
    assert_the_same(folder, folder / "alone")


@pytest.mark.full
def test_experts_over_ranks_match_one_rank(folder: Path) -> None:
    (folder / "experts.yaml").write_text(EXPERTS)
    for name, size in (("whole", 1), ("spread", 2)):
        done = start(
            folder, "finetune", "llm", "-c", "experts.yaml", "--output_dir", name, "--distributed.ep_size", str(size)
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert "ep_size=2, 4 processes" in done.stdout
    assert losses(folder / "spread") == pytest.approx(losses(folder / "whole"), rel=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("words", [("distributed.schedule=gpipe",), ("distributed.remat=layer",)], ids=["gpipe", "remat"])
def test_every_layout_gives_the_same(
    folder: Path, two_processes: subprocess.CompletedProcess[str], words: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    output = folder / request.node.callspec.id
    done = start(folder, "finetune", "llm", "-c", "cfg.yaml", *words, f"--output_dir={output}")
    assert done.returncode == 0, done.stderr
    assert_the_same(folder, output)


def assert_the_same(folder: Path, output: Path) -> None:
    """Losses and weights equal those of the run on two processes, bit for bit."""
    assert losses(output) == losses(folder / "runs" / "cfg"), "bit for bit"
    assert metrics(output)[-1]["validation_loss"] == metrics(folder / "runs" / "cfg")[-1]["validation_loss"]
    expected, found = (load_file(each / "model.safetensors") for each in (folder / "runs" / "cfg", output))
    assert_same_tree(expected, found)
    assert "head.weight" not in found


@pytest.mark.full
@pytest.mark.parametrize(
    ("words", "processes"),
    [
        pytest.param(("--nproc-per-node", "4", "--distributed.strategy", "ddp"), 4, id="ddp, inferred"),
        pytest.param(("--distributed.dp_size", "2"), 4, id="fsdp2"),
        pytest.param(
            ("--distributed.pp_size", "1", "--distributed.tp_size", "2", "--distributed.sequence_parallel", "true"), 2,
            id="tp",
        ),
        pytest.param(
            ("--distributed.tp_size", "2", "--distributed.reshard_after_forward", "true", "distributed.dp_size=2"), 8,
            id="all",
        ),
    ],
)  # fmt: skip
def test_every_mesh_gives_the_same_up_to_rounding(
    folder: Path,
    two_processes: subprocess.CompletedProcess[str],
    words: tuple[str, ...],
    processes: int,
    request: pytest.FixtureRequest,
) -> None:
    output = folder / request.node.callspec.id.replace(" ", "-")
    done = start(folder, "finetune", "llm", "-c", "cfg.yaml", *words, f"--output_dir={output}")
    assert done.returncode == 0, done.stderr
    assert f"starting {processes} processes" in done.stdout
    expected, found = metrics(folder / "runs" / "cfg"), metrics(output)
    for one, other in zip(expected, found, strict=True):
        assert computed(other) == pytest.approx(computed(one), rel=1e-4)
    weights = load_file(folder / "runs" / "cfg" / "model.safetensors")
    for path, leaf in load_file(output / "model.safetensors").items():
        if not path.endswith("attn.k.bias"):  # its gradient is zero, and AdamW divides what rounding leaves by itself
            torch.testing.assert_close(leaf, weights[path], rtol=1e-3, atol=1e-4)


@pytest.mark.full
def test_a_searched_schedule_gives_the_same(folder: Path, two_processes: subprocess.CompletedProcess[str]) -> None:
    done = start(folder, "finetune", "llm", "-c", "cfg.yaml", "distributed.schedule=auto", "--output_dir", "auto")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert losses(folder / "auto") == losses(folder / "runs" / "cfg"), "bit for bit"
    assert metrics(folder / "auto")[-1]["validation_loss"] == metrics(folder / "runs" / "cfg")[-1]["validation_loss"]
    expected, found = (load_file(folder / name / "model.safetensors") for name in ("runs/cfg", "auto"))
    assert_same_tree(expected, found)
    words = " ".join(done.stdout.split())
    chosen = re.search(r"ms of a microbatch by stage: F .* schedule auto: (\w+), [\d.]+ ms a step predicted", words)
    assert chosen and f"schedule {chosen[1]}: 2 ranks, 4 microbatches" in words, "it is drawn"
    assert "written to auto/schedule.csv; distributed.schedule takes this file to reuse it" in words
    written = schedule.read_file(folder / "auto" / "schedule.csv")
    schedule.validate(written)
    assert written.in_order and (written.num_ranks, written.num_stages, written.num_microbatches) == (2, 2, 4)


def test_the_same_file_under_torchrun(folder: Path, two_processes: subprocess.CompletedProcess[str]) -> None:
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "autofunc")
    done = start(folder, "finetune", "llm", "-c", "cfg.yaml", "--output_dir", "torchrun", program=torchrun)
    assert done.returncode == 0, done.stderr
    assert losses(folder / "torchrun") == losses(folder / "runs" / "cfg")


FULL = pytest.mark.full


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raised", "ValueError"),
        ("SIGKILL", "killed by SIGKILL"),
        pytest.param("SIGTERM", "killed by SIGTERM", marks=FULL),
        pytest.param("SIGINT", "killed by SIGINT", marks=FULL),
        pytest.param("left", "exit code 137", marks=FULL),
        pytest.param("exit", "sys.exit(3)", marks=FULL),
    ],
)
def test_a_dying_worker_ends_the_others(folder: Path, how: str, words: str) -> None:
    done = start(
        folder, "finetune", "llm", "-c", "cfg.yaml", "--model._target_", "dying.py:build", "--model.how", how,
        "--output_dir", f"dying-{how}", "--distributed.engine", "eager",
    )  # fmt: skip
    died = float((folder / f"died-{how}").read_text())
    assert time.time() - died < 30, "seconds from the death of one to the end of all"
    assert done.returncode == 1
    assert re.search(r"error: rank 1 \(step 4, in 1F\d\) failed", done.stderr), done.stderr
    assert words in done.stderr
    if how == "raised":
        assert done.stderr.count("ValueError: broken on purpose\n") == 1
        assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) < 12
        assert done.stderr.count('raise ValueError("broken on purpose")') == 1, "the user's line"
        assert "PeerLostError" not in done.stderr, "the other rank's error is a consequence"
        assert re.search(r"rank 1, step \d, action 1F\d \(stage 1, microbatch \d\)", done.stderr) and ">>1F" in done.stderr
    assert len(losses(folder / f"dying-{how}")) >= 1, "what was measured before is kept"


@pytest.mark.full
@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
def test_a_dying_launcher_leaves_no_worker(folder: Path, how: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    words = [sys.executable, "-m", "autofunc", "finetune", "llm", "-c", "cfg.yaml", "--output_dir", f"launcher-{how}"]
    words += ["--step_scheduler.max_steps", "100000", "--step_scheduler.num_epochs", "100000"]
    launcher = subprocess.Popen(words, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    written = folder / f"launcher-{how}" / "metrics.jsonl"
    _until(lambda: written.exists() and written.read_text().count("\n") > 1)
    (server,) = _children(launcher.pid)
    workers = _children(server)
    assert len(workers) == 2
    launcher.send_signal(getattr(signal, how))
    launcher.wait(60)
    _until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in (server, *workers)))


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_rows_that_differ_between_ranks(tmp_path: Path) -> None:
    (tmp_path / "rows.py").write_text(
        "import os, torch\n"
        "def rows(): return Rows()\n"
        "class Rows:\n"
        "    def __len__(self): return 8\n"
        "    def __getitem__(self, index):\n"
        "        ids = torch.tensor(list(os.urandom(17)))\n"
        "        return {'input_ids': ids[:-1], 'labels': ids[1:]}\n"
    )
    dataset, validation, *_ = (line for line in CONFIG.splitlines() if "dataset:" in line)
    config = CONFIG.replace(dataset, "dataset: {_target_: rows.py:rows}").replace(validation, "")
    (tmp_path / "cfg.yaml").write_text(config)
    done = start(tmp_path, "finetune", "llm", "-c", "cfg.yaml")
    assert done.returncode == 1 and "have read different rows for step 1" in done.stderr


def test_without_a_launcher_the_error_is_printed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    done = start(folder, "finetune", "llm", "-c", "cfg.yaml")  # it ends its process
    assert done.returncode == 1
    assert done.stderr.startswith("error: distributed: pp_size=2 and tp_size=1 need 2 processes or a multiple, but")


@pytest.mark.full
def test_torchrun_with_a_wrong_number_of_processes(folder: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "1", "-m", "autofunc")
    done = start(folder, "finetune", "llm", "-c", "cfg.yaml", program=torchrun)
    assert done.returncode != 0
    assert "pp_size=2 and tp_size=1 need 2 processes or a multiple, but there are 1" in done.stderr
