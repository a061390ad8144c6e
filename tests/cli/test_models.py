"""The three ways to bring a model, by the commands a user types."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from autofunc.config import read_config
from autofunc.train import planning
from autofunc.train.model import make
from tests.cli.here import run_here

ROOT = Path(__file__).parent.parent.parent

RUN = """
dataset: {_target_: autofunc.data.TextFolder, path: corpus, seq_len: 16, aligned_labels: false}
step_scheduler: {global_batch_size: 8, local_batch_size: 2, max_steps: 4}
distributed: {pp_size: 2, schedule: zb_h1}
optimizer: {_target_: torch.optim.AdamW, lr: 1e-3}
"""

MODELS = '''
from dataclasses import dataclass
import torch
from torch import nn
from torch.nn import functional


@dataclass
class TinyConfig:
    vocab_size: int = 256
    width: int = 16
    depth: int = 3


class TinyForCausalLM(nn.Module):
    """model_type: tiny."""

    config_class = TinyConfig

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList([nn.Linear(config.width, config.width) for _ in range(config.depth)])
        self.lm_head = nn.Linear(config.width, config.vocab_size)

    def forward(self, input_ids, labels):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        logits = self.lm_head(x)
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


def build(**sizes):
    return TinyForCausalLM(TinyConfig(**sizes))


class NormedForCausalLM(TinyForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.blocks = nn.ModuleList([Normed(config.width) for _ in range(config.depth)])


class Normed(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.BatchNorm1d(width)

    def forward(self, x):
        return self.norm(self.linear(x).flatten(0, 1)).view_as(x)


def build_normed(**sizes):
    return NormedForCausalLM(TinyConfig(**sizes))


class Remembering(nn.Linear):
    def forward(self, x):
        before, self.last = getattr(self, "last", 0.0), x.detach()
        return super().forward(x) + before


def build_broken(**sizes):
    module = build(**sizes)
    module.blocks[1] = Remembering(16, 16)
    return module
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's working directory."""
    path = tmp_path_factory.mktemp("models")
    (path / "corpus").mkdir()
    (path / "corpus" / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    (path / "my_models").mkdir()
    (path / "my_models" / "custom_llm.py").write_text(MODELS)
    for name, model in (
        ("own", "{_target_: my_models.custom_llm.build, width: 16}"),
        ("file", '{_target_: "my_models/custom_llm.py:build", width: 16}'),
        ("broken", "{_target_: my_models.custom_llm.build_broken}"),
        ("normed", "{_target_: my_models.custom_llm.build_normed}"),
        ("registered", "{_target_: autofunc.AutoModel.from_config, config: {model_type: tiny, width: 16}}"),
    ):
        (path / f"{name}.yaml").write_text(f"model: {model}\n{RUN}")
    return path


def autofunc(folder: Path, *words: str, status: int = 0) -> str:
    """Run a command in this process; return its output, or its errors if they are expected."""
    done = run_here(folder, *words)
    assert done.status == status, done.out + done.err
    assert "has no effect" not in done.err, "a run warns of the seed that its configuration always has"
    return done.out if status != 2 else done.err


def losses(folder: Path, run: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / run / "metrics.jsonl").read_text().splitlines()]


ALONE = ("--distributed.pp_size", "1", "--distributed.split_points", "1")


def train(folder: Path, config: str, run: str, *overrides: str) -> list[float]:
    """Run on one process: this one."""
    autofunc(folder, "finetune", "llm", "-c", config, "--output_dir", run, *overrides, *ALONE)
    return losses(folder, run)


def train_on_two(folder: Path, config: str, run: str, *overrides: str) -> list[float]:
    """Run the command, which starts two processes."""
    done = subprocess.run(
        [sys.executable, "-m", "autofunc", "finetune", "llm", "-c", config, "--output_dir", run, *overrides],
        cwd=folder, capture_output=True, text=True, timeout=300, env={**os.environ, "NO_COLOR": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return losses(folder, run)


def test_any_module(folder: Path) -> None:
    """On two processes, on one, and by its file: the same losses, from the module's own weights and its own loss."""
    two = train_on_two(folder, "own.yaml", "two")
    assert train(folder, "file.yaml", "one") == two
    assert two[0] != two[-1] and 4 < two[0] < 7


@pytest.mark.parametrize("train_again", [train, pytest.param(train_on_two, marks=pytest.mark.full)])
def test_registered(folder: Path, train_again: Callable[..., list[float]]) -> None:
    """By the registry, without weights in any process; its trained part exported, read by stage, and trained on."""
    paths = ["--modeling_paths", "[my_models.custom_llm]"]
    first = train(folder, "registered.yaml", "registered", *paths)
    exported = autofunc(
        folder, "export", "-c", "registered.yaml", "--weights", "registered", "-o", "exported", *paths
    )  # fmt: skip
    assert "written to exported" in exported
    assert json.loads((folder / "exported" / "config.json").read_text())["model_type"] == "tiny"
    (folder / "again.yaml").write_text(
        "model: {_target_: autofunc.AutoModel.from_pretrained, pretrained_model_name_or_path: exported}\n"
        'modeling_paths: ["my_models/custom_llm.py"]\n'
        f'trainable: ["lm_head*"]\n{RUN}'
    )
    second = train_again(folder, "again.yaml", "again")
    assert second[0] < first[0]
    before, after = (load_file(folder / run / "model.safetensors") for run in ("registered", "again"))
    changed = {path for path, leaf in before.items() if not torch.equal(leaf, after[path])}
    assert changed == {"lm_head.weight", "lm_head.bias"}


def test_weights_from_the_seed_and_from_a_run(folder: Path) -> None:
    seeded = train(folder, "own.yaml", "seeded", "--weights", "seed")
    own = train(folder, "own.yaml", "not_seeded")
    assert seeded != own
    went_on = train(folder, "own.yaml", "went_on", "--weights", "seeded/model.safetensors")
    assert went_on[0] < seeded[0]


@pytest.mark.full
def test_weights_from_the_seed_on_two_processes(folder: Path) -> None:
    alone = train(folder, "own.yaml", "seeded_alone", "--weights", "seed")
    assert train_on_two(folder, "own.yaml", "seeded_two", "--weights", "seed") == alone


def test_statistics_are_trained_saved_and_read(folder: Path) -> None:
    """Running statistics of batch normalisation need no key in the configuration."""
    first = train(folder, "normed.yaml", "normed")
    stored = load_file(folder / "normed" / "model.safetensors")
    assert stored["blocks.2.norm.num_batches_tracked"] == 16  # 4 steps of 4 microbatches
    assert not torch.equal(stored["blocks.0.norm.running_mean"], torch.zeros(16))
    went_on = train(folder, "normed.yaml", "normed_on", "--weights", "normed/model.safetensors")
    assert went_on[0] < first[0]
    again = load_file(folder / "normed_on" / "model.safetensors")
    assert again["blocks.2.norm.num_batches_tracked"] == 32
    autofunc(folder, "export", "-c", "normed.yaml", "--weights", "normed_on", "-o", "normed_exported")
    exported = load_file(folder / "normed_exported" / "model.safetensors")
    assert all(torch.equal(exported[path], leaf) for path, leaf in again.items())


def test_adapters_are_trained_written_and_exported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run leaves an adapter that PEFT loads, and no copy of the base; the exported model contains it."""
    words = ("--peft.target_modules", "[blocks.*]", "--peft.dim", "2", "--peft.modules_to_save", "[lm_head]")
    done = autofunc(folder, "finetune", "llm", "-c", "file.yaml", "--output_dir", "adapted", *words, *ALONE)
    assert "adapters of rank 2 on 3 weights: 4,544 of 9,456 parameters are trained (48.05%)" in done
    assert (
        "written to adapted: metrics.jsonl, loss.png, run.html, adapter" in done
        and not (folder / "adapted/model.safetensors").exists()
    )
    found = losses(folder, "adapted")
    assert found[-1] < found[0]
    stored = load_file(folder / "adapted" / "adapter" / "adapter_model.safetensors")
    blocks = {f"base_model.model.blocks.{block}.lora_{factor}.weight" for block in range(3) for factor in "AB"}
    assert stored.keys() == {*blocks, "base_model.model.lm_head.weight", "base_model.model.lm_head.bias"}
    assert all(leaf.any() for leaf in stored.values())
    autofunc(folder, "export", "-c", "file.yaml", "--weights", "adapted", "-o", "exported", *words)
    exported = load_file(folder / "exported" / "model.safetensors")
    monkeypatch.chdir(folder)
    plain = make(read_config("file.yaml", [])[0]).state_dict()
    a, b = (stored[f"base_model.model.blocks.0.lora_{factor}.weight"] for factor in "AB")
    torch.testing.assert_close(exported["blocks.0.weight"], plain["blocks.0.weight"] + 32 / 2 * b @ a)
    assert torch.equal(exported["embed.weight"], plain["embed.weight"])
    assert torch.equal(exported["lm_head.weight"], stored["base_model.model.lm_head.weight"])
    assert "already holds a run (metrics.jsonl, loss.png, run.html, adapter/adapter_config.json" in autofunc(
        folder, "finetune", "llm", "-c", "file.yaml", "--output_dir", "adapted", *words, *ALONE, status=2
    )


def test_check(folder: Path) -> None:
    shown = autofunc(folder, "check", "-c", "own.yaml")
    assert "0 failed" in shown and max(map(len, shown.splitlines())) <= 80
    shown = autofunc(folder, "check", "-c", "broken.yaml", status=1)
    assert "C4  fail" in shown and "custom_llm.py" in shown and "stores last" in " ".join(shown.split())
    report: dict[str, Any] = json.loads(autofunc(folder, "check", "-c", "broken.yaml", "--json", status=1))
    assert report["ok"] is False and {verdict["code"] for verdict in report["verdicts"]} >= {"C1", "C5", "P1", "P5"}


def test_plan(folder: Path) -> None:
    shown = autofunc(folder, "plan", "-c", "own.yaml", "--draw", "plan.svg")
    assert "split_points: [" in shown and "rank 1 |" in shown and (folder / "plan.svg").exists()
    assert max(map(len, shown.splitlines())) <= 80
    assert re.search(r"times: operations, at the rate of [\w.]+, timed\s+here", shown)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "_LONGEST_TIMED_MS", 0.0)
        shown = " ".join(autofunc(folder, "plan", "-c", "own.yaml").split())
    assert re.search(r"a step may take several times as long, for [\w.]+ would take longer than 0 s", shown)
    assert "connections between pp ranks, each one way: 2 on ranks 0-1" in shown and "of a GPU" not in shown
    on_gpus = " ".join(autofunc(folder, "plan", "-c", "own.yaml", "--distributed.device", "cuda").split())
    assert "they take at most 256 MiB of a GPU, assuming a buffer of 4 MiB (NCCL_BUFFSIZE) for each of 32" in on_gpus
    planned: dict[str, Any] = json.loads(autofunc(folder, "plan", "-c", "own.yaml", "--json", "--measure"))
    assert [(rank["connections"], rank["connection_bytes"]) for rank in planned["ranks"]] == [(2, None)] * 2
    assert planned["times_are"] == "measured" and planned["timed_layer"] is None and planned["processes"] == 2
    first, second = planned["stages"]
    assert first["sends_bytes"] == 2 * 16 * 16 * 4 and second["sends_bytes"] == 0
    assert sum(stage["parameters"] for stage in (first, second)) == 256 * 16 + 3 * 272 + 256 * 17
    assert planned["ranks"][0]["optimizer_bytes"] == 2 * planned["ranks"][0]["parameter_bytes"]
    assert planned["step_time_ms"] > 0 and 0 < planned["bubble_fraction"] < 1


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        ("own.yaml", ["--inputs", "[input_id]"], "inputs name 'input_id', which the batch does not have"),
        ("own.yaml", ["--trainable", "[lm_haed*]"], "trainable pattern 'lm_haed*' matches no parameter"),
        ("own.yaml", ["--weights", "nowhere"], "no weights at nowhere"),
        ("own.yaml", ["--distributed.split_points", "[block.1]"], "did you mean blocks.1"),
        ("own.yaml", ["--distributed.tp_size", "3"], "tp=3: nothing in TinyForCausalLM can be cut"),
        (
            "own.yaml",
            ["--distributed.tp_size", "2", "--distributed.tp_plan", "own"],
            "has no tensor parallel plan of its own",
        ),
        ("own.yaml", ["--distributed.tp_size", "2", "--distributed.tp_plan", "{'*.fc': colwise}"], "matches no parameter"),
        ("broken.yaml", [], "keeps state from one forward to the next"),
        ("registered.yaml", [], "tiny"),
        ("registered.yaml", ["--modeling_paths", "[my_model]"], "modeling_paths: "),
    ],
)
def test_mistakes(folder: Path, config: str, overrides: list[str], message: str) -> None:
    error = autofunc(folder, "finetune", "llm", "-c", config, *overrides, status=2)
    assert message in " ".join(error.split()), error
    assert error.count("error: ") == 1 and "Traceback" not in error


def test_labels_are_not_shifted_twice(folder: Path) -> None:
    (folder / "hf.yaml").write_text(
        "model:\n  _target_: transformers.GPT2LMHeadModel\n  config: {_target_: transformers.GPT2Config, n_layer: 2, "
        f"n_embd: 16, n_head: 2, vocab_size: 256, n_positions: 16, bos_token_id: 1, eos_token_id: 1}}\n{RUN}"
    )
    error = autofunc(folder, "plan", "-c", "hf.yaml", "--dataset.aligned_labels", "true", status=2)
    assert "shifts the labels itself" in error and "aligned_labels: false" in error
    assert "no loss_fn: the loss is the model's own" in autofunc(folder, "plan", "-c", "hf.yaml")
    causal = ["--loss_fn._target_", "autofunc.losses.causal_lm", "--dataset.aligned_labels", "true"]
    assert "split_points" in autofunc(folder, "plan", "-c", "hf.yaml", *causal)


def test_the_example_trains(tmp_path: Path) -> None:
    text = (ROOT / "examples" / "custom_model.py").read_text()
    assert len(text.splitlines()) < 60 and "autofunc" not in text
    words = ("finetune", "llm", "-c", "examples/custom_model.yaml", "--step_scheduler.max_steps", "2", "--output_dir")
    assert "2 steps in" in autofunc(ROOT, *words, str(tmp_path), *ALONE)


@pytest.mark.full
def test_the_example_trains_on_two_processes(tmp_path: Path) -> None:
    assert len(train_on_two(ROOT, "examples/custom_model.yaml", str(tmp_path), "--step_scheduler.max_steps", "2")) == 2


def test_a_captured_module_over_tp_ranks(folder: Path) -> None:
    (folder / "tp.yaml").write_text(
        "model:\n  _target_: transformers.GPT2LMHeadModel\n  config: {_target_: transformers.GPT2Config, n_layer: 2, "
        f"n_embd: 16, n_head: 2, vocab_size: 256, n_positions: 16, bos_token_id: 1, eos_token_id: 1}}\n{RUN}"
    )
    shown = " ".join(autofunc(folder, "plan", "-c", "tp.yaml", "--distributed.tp_size", "2").split())
    assert "cut over 2 tp ranks, by the table derived from its graph:" in shown
    assert "transformer.h.*.attn.c_attn.weight: dim 1, in parts of 3 x 16 (2 parameters)" in shown
    assert "not known" not in shown, "what ranks keep"
    error = autofunc(folder, "plan", "-c", "tp.yaml", "--distributed.tp_size", "3", status=2)
    assert "tp=3" in error and "error: " in error
