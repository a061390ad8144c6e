"""A recipe of NeMo AutoModel: what is said of it as it is, and that it runs with its keys rewritten."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.cli.here import run_here

ROOT = Path(__file__).parents[2]

AS_IT_IS = """
step_scheduler: {global_batch_size: 64, local_batch_size: 8, ckpt_every_steps: 200, num_epochs: 1}
dist_env: {backend: nccl, timeout_minutes: 1}
rng: {_target_: nemo_automodel.components.training.rng.StatefulRNG, seed: 1111, ranked: true}
model: {_target_: nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path: x/y}
checkpoint: {enabled: true, checkpoint_dir: checkpoints/, model_save_format: torch_save, save_consolidated: false}
peft: {_target_: nemo_automodel.components._peft.lora.PeftConfig, match_all_linear: True, dim: 8, use_triton: True}
distributed: {strategy: fsdp2, dp_size: none, tp_size: 1, cp_size: 1, sequence_parallel: false}
loss_fn: {_target_: nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy}
dataset: {_target_: nemo_automodel.components.datasets.llm.hellaswag.HellaSwag, path_or_dataset: x/y, split: train}
packed_sequence: {packed_sequence_size: 0}
dataloader: {_target_: torchdata.stateful_dataloader.StatefulDataLoader, collate_fn: a.b, shuffle: true}
validation_dataloader: {_target_: torchdata.stateful_dataloader.StatefulDataLoader, collate_fn: a.b}
optimizer: {_target_: torch.optim.Adam, betas: [0.9, 0.999], lr: 1.0e-5, weight_decay: 0.0}
"""
UNKNOWN = [
    "dist_env.backend", "dist_env.timeout_minutes", "rng.seed", "checkpoint.model_save_format", "peft._target_",
    "peft.use_triton", "packed_sequence", "dataloader._target_", "dataloader.collate_fn",
    "validation_dataloader._target_", "validation_dataloader.collate_fn",
]  # fmt: skip


def test_all_that_is_not_supported_is_one_list(tmp_path: Path) -> None:
    (tmp_path / "cfg.yaml").write_text(AS_IT_IS)
    done = run_here(tmp_path, "config", "validate", "-c", "cfg.yaml")
    assert done.status == 2
    for key in UNKNOWN:
        assert f"'{key}', of NeMo AutoModel; here: " in done.err, key
    assert "has no equivalent here" not in done.err and "dp_size" not in done.err, "the rest is understood"
    assert len(done.err.splitlines()) == len(UNKNOWN) + 1, done.err  # rng is told as a whole, too


def test_a_name_that_is_unknown_is_told(tmp_path: Path) -> None:
    (tmp_path / "cfg.yaml").write_text(AS_IT_IS.replace("masked_ce.MaskedCrossEntropy", "te.TEParallelCrossEntropy"))
    err = run_here(tmp_path, "config", "validate", "-c", "cfg.yaml").err
    assert "'nemo_automodel.components.loss.te.TEParallelCrossEntropy' of NeMo AutoModel has no equivalent here" in err


@pytest.mark.parametrize("more", [(), ("--peft.match_all_linear", "true", "--peft.dim", "2")], ids=["", "peft"])
def test_the_example_runs_but_for_its_hub_names(tmp_path: Path, more: tuple[str, ...]) -> None:
    config = LlamaConfig(
        vocab_size=256, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llama")
    rows = str(ROOT / "examples" / "data" / "hellaswag_sample.jsonl")
    local = ["--model.pretrained_model_name_or_path", "llama", "--step_scheduler.global_batch_size", "8"]
    for dataset in ("dataset", "validation_dataset"):
        local += [f"--{dataset}.path_or_dataset", rows, f"--{dataset}.tokenizer", "null"]
    example = str(ROOT / "examples" / "automodel_hellaswag.yaml")
    done = run_here(
        tmp_path, "finetune", "llm", "-c", example, "--output_dir", "out", *local, "--step_scheduler.max_steps", "1",
        "--validation_dataset.split", "train", *more,
    )  # fmt: skip
    assert done.status == 0, done.err
    assert "validation loss: " in done.out
    assert (tmp_path / "out" / "checkpoints" / "step_1").is_dir()
