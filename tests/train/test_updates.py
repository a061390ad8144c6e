"""`optimizer` and `lr_scheduler`: how a run updates its parameters."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from autofunc.config import FinetuneConfig, load_config, parse_config
from autofunc.config.nemo_names import with_new_names
from autofunc.errors import ConfigError
from autofunc.train.learning_rate import learning_rate_of
from autofunc.train.optimizer import build_optimizer, check_optimizer
from autofunc.tree import flatten
from stages.gpt2 import build_gpt2_model
from tests.cli.here import run_here

CONFIG = """
model: {_target_: stages.gpt2.build_gpt2_model, vocab_size: 256, n_positions: 16, n_embd: 16, n_layer: 1, n_head: 2}
dataset: {_target_: autofunc.data.TextFolder, path: corpus, seq_len: 16}
step_scheduler: {global_batch_size: 4, local_batch_size: 2, max_steps: 3, gc_every_steps: 2}
distributed: {device: cpu, engine: eager}
optimizer:
- {_target_: torch.optim.Muon, lr: 0.02, params: ["h.*.attn.*.weight", "h.*.mlp.*.weight"]}
- _target_: torch.optim.AdamW
  lr: 1e-3
  decay: matrices
  param_groups: [{pattern: "w?e.weight", lr_mult: 0, weight_decay: 0}]
lr_scheduler: {lr_decay_style: linear, lr_warmup_steps: 1, min_lr: 0}
"""
MODEL = build_gpt2_model(vocab_size=256, n_positions=16, n_embd=16, n_layer=1, n_head=2)


def test_a_run_with_two_optimizers_groups_and_a_decay(tmp_path: Path) -> None:
    (tmp_path / "cfg.yaml").write_text(CONFIG)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 30)
    done = run_here(tmp_path, "finetune", "llm", "-c", "cfg.yaml")
    assert done.status == 0, done.err
    lines = [json.loads(line) for line in (tmp_path / "runs" / "cfg" / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines] == pytest.approx([0.002, 0.02, 0.01])
    assert "B  lr 2.00e-03" in done.out and "B  lr 1.00e-02" in done.out, "after speed and memory"
    before, after = flatten(MODEL.init(seed=42)), load_file(tmp_path / "runs" / "cfg" / "model.safetensors")
    kept = {path for path in before if torch.equal(before[path], after[path])}
    assert kept == {"wte.weight", "wpe.weight"}
    planned = run_here(tmp_path, "plan", "-c", "cfg.yaml", "--json")
    assert planned.status == 0, planned.err
    (rank,) = json.loads(planned.out)["ranks"]
    sizes = {path: 4 * leaf.numel() for path, leaf in before.items()}
    by_muon = sum(size for path, size in sizes.items() if path.startswith("h.") and before[path].dim() == 2)
    assert rank["optimizer_bytes"] == 2 * sum(sizes.values()) - by_muon


def config_of(text: str, tmp_path: Path) -> FinetuneConfig:
    (tmp_path / "part.yaml").write_text(CONFIG.partition("optimizer:")[0] + text)
    return parse_config(load_config(tmp_path / "part.yaml"))


T = "torch.optim.lr_scheduler"
ONE_CYCLE = f"lr_scheduler: {{_target_: {T}.OneCycleLR, max_lr: 1, total_steps: 9, cycle_momentum: false}}"
SGD = "optimizer: {_target_: torch.optim.SGD, lr: 1.0}\n"


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("{}", [0.1, 0.55, 1.0, 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi / 18))]),
        ("{lr_decay_style: constant, lr_warmup_steps: 2, init_lr: 0, max_lr: 2}", [0, 1.0, 2.0, 2.0]),
        ("{lr_decay_style: WSD, lr_warmup_steps: 0, lr_decay_steps: 3, wsd_decay_steps: 2, min_lr: 0.5}", None),
        (f"{{_target_: {T}.StepLR, step_size: 2}}", [1.0, 1.0, 0.1, 0.1]),
        (f"{{_target_: {T}.LambdaLR, lr_lambda: 'half.py:half'}}", [1.0, 0.5, 0.25, 0.125]),
        (f"{{_target_: {T}.LambdaLR, lr_lambda: {{_target_: 'half.py:power', base: 4}}}}", [1.0, 0.25, 0.0625, 1 / 64]),
        (
            f"{{_target_: {T}.SequentialLR, milestones: [2], schedulers: [{{_target_: {T}.ConstantLR, factor: 0.5}}, "
            f"{{_target_: {T}.ExponentialLR, gamma: 0.5}}]}}",
            [0.5, 0.5, 1.0, 0.5],
        ),
        (f"{{_target_: {T}.ChainedScheduler, schedulers: [{{_target_: {T}.ExponentialLR, gamma: 0.5}}]}}", None),
    ],
)
def test_learning_rates(section: str, expected: list[float] | None, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "half.py").write_text("def half(n): return 0.5**n\ndef power(base): return lambda n: base**-n\n")
    monkeypatch.chdir(tmp_path)
    config = config_of(SGD + f"lr_scheduler: {section}", tmp_path)
    lr_at = learning_rate_of(config, build_optimizer(config), 20)
    assert lr_at is not None
    found = [lr_at(step) for step in range(1, 5)]
    assert found == pytest.approx(expected or [1.0, found[1], found[2], found[3]])
    assert found[1] < 1.0 or expected or "WSD" in section


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SGD + "lr_scheduler: {lr_warmup_steps: 20}", "lr_scheduler: lr_warmup_steps=20 leaves nothing of lr_decay_st"),
        (SGD + f"lr_scheduler: {{_target_: {T}.ReduceLROnPlateau}}", "needs metrics in each step, .* use one that is"),
        (SGD + ONE_CYCLE, "ends after total_steps=9, and the run has 20 steps"),
        (SGD + "lr_scheduler: {_target_: torch.optim.SGD}", "lr_scheduler: expected a scheduler .*; got torch.optim.SGD"),
        (SGD + f"lr_scheduler: {{_target_: {T}.LambdaLR, lr_lambda: math.sqr}}", "lr_lambda: .math.sqr.: .*sqrt"),
        ("optimizer: {_target_: torch.optim.AdamW, param_groups: [{pattern: 'wte.w'}]}", "did you mean wte.weight"),
        ("optimizer: {_target_: torch.optim.AdamW, param_groups: [{pattern: 'wte.*', bets: 1}]}", "did you mean betas"),
        ("optimizer: {_target_: torch.optim.Muon}", "Muon takes only matrices, .*bias.*torch.optim.AdamW, with params"),
        ("optimizer: [{_target_: torch.optim.SGD}, {_target_: torch.optim.SGD}]", "optimizer: .* none are left for"),
        ("optimizer: {_target_: torch.optim.SparseAdam}", "optimizer: .* takes only sparse gradients"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_the_start(text: str, message: str, tmp_path: Path) -> None:
    config = config_of(text, tmp_path)
    with pytest.raises(ConfigError, match=message):
        made = build_optimizer(config)
        check_optimizer(made, MODEL)
        learning_rate_of(config, made, 20)


def test_overrides_of_nemo_automodel() -> None:
    given = [
        {"pattern": r"attn.*\.bias$", "lr_mult": 0.1},
        {"pattern": "^wte|router.bias", "wd_mult": 0.0},
    ]
    raw = {"optimizer": {"_target_": "torch.optim.AdamW", "param_group_overrides": given}}
    renamed, notes, problems = with_new_names(raw)
    assert renamed["optimizer"]["param_groups"] == [
        {"pattern": "*attn*.bias", "lr_mult": 0.1},
        {"pattern": "wte*", "wd_mult": 0.0},
        {"pattern": "*router?bias*", "wd_mult": 0.0},
    ]
    assert not problems and len(notes) == 2 and "param_group_overrides" not in renamed["optimizer"]
    for pattern in (r"(q|k)_proj", r"h\.[0-9]+", "a+", None):
        raw["optimizer"]["param_group_overrides"] = [{"pattern": pattern}]
        assert "cannot be written as shell-style patterns" in with_new_names(raw)[2][0]
