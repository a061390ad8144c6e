"""Planned memory matches what ranks hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import autofunc as af
from autofunc import tree
from autofunc.config import load_config, parse_config
from autofunc.shard.dtensors import local
from autofunc.train.loop import build_pipe
from autofunc.train.planning import RunPlan, plan_run
from autofunc.train.recipe import prepare
from autofunc.train.weighing import counting_all
from tests.cases import mesh_of
from tests.pool import WorkerPool

RUN = """
model: {{_target_: tests.shard.spread_models.model_of, name: {name}}}
inputs: [input_ids]
dataset: {{_target_: autofunc.data.MadeUpTokens, vocab_size: 32, seq_len: 8, num_rows: 16}}
loss_fn: {{_target_: autofunc.losses.causal_lm}}
step_scheduler: {{global_batch_size: 8, local_batch_size: 1, max_steps: 1}}
distributed: {{{axes}, schedule: 1f1b, device: cpu}}
optimizer: {{_target_: torch.optim.AdamW, lr: 1e-3}}
"""
CASES = {
    "tp beside pp": ("llama", "pp_size: 2, tp_size: 2"),
    "tp beside cp": ("llama", "cp_size: 2, tp_size: 2, mp_policy: {param_dtype: bfloat16}"),
    "ep beside pp": ("mixtral", "pp_size: 2, ep_size: 2, dp_size: 2"),
}


def config_of(case: str, folder: Path) -> Any:
    name, axes = CASES[case]
    path = folder / "plan.yaml"
    path.write_text(RUN.format(name=name, axes=axes))
    return parse_config(load_config(path))


def planned(case: str, folder: Path) -> RunPlan:
    return plan_run(config_of(case, folder), None, (), measure=False, on_progress=lambda _: None)


def size_of(leaves: Any) -> int:
    parts = [local(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return sum(part.numel() * part.element_size() for part in parts if part.numel() > 1 or part.dim())


def held(case: str, folder: Path) -> tuple[int, int, int, int]:
    """Return a process's pp rank, and its bytes: parameters, optimizer state, and the most alive in a step besides."""
    (folder / str(torch.distributed.get_rank())).mkdir(exist_ok=True)
    recipe = prepare(config_of(case, folder / str(torch.distributed.get_rank())), 4, checked=True)
    axes = recipe.axes
    mesh = mesh_of(pp=axes.pp, dp_shard=axes.dp_shard, cp=axes.cp, tp=axes.tp)
    pipe, batch = build_pipe(recipe, mesh), counting_all(recipe.example())
    params = pipe.init(recipe.seed)
    rank, most = mesh.get_local_rank("pp"), [max(alive) for alive in pipe.measure_bytes(params, batch, (0, 1))]
    _, grads = af.value_and_grad(pipe)(params, batch, key=(0, 1))
    bytes_of_params = size_of(tree.flatten(params).values())
    _, state = recipe.optimizer.update(grads, recipe.optimizer.init(params), params)
    return rank, bytes_of_params, size_of(tree.flatten(state).values()), most[rank]


@pytest.mark.full
@pytest.mark.parametrize("case", CASES)
def test_ranks_hold_what_was_planned(workers: WorkerPool, case: str, tmp_path: Path) -> None:
    plan = planned(case, tmp_path)
    for rank, of_params, of_optimizer, most in workers.run(held, case, tmp_path):
        found = plan.ranks[rank]
        assert found.parameter_bytes == of_params
        assert found.optimizer_bytes == of_optimizer
        assert found.activation_bytes is not None and found.activation_bytes + found.gathered_bytes == most


def test_by_hand(tmp_path: Path) -> None:
    """A Llama of two blocks: 16 features, 24 in the MLP, 4 heads and 2 key heads, 32 words; fp32, computed in bf16."""
    table, block, norm = 32 * 16, 2 * 16 * 16 + 2 * 8 * 16 + 3 * 24 * 16, 16
    (rank,) = planned("tp beside cp", tmp_path).ranks
    of_tp_rank = (2 * table + 2 * block) // 2 + 5 * norm
    assert rank.parameter_bytes == 4 * of_tp_rank // 2, "shared by the cp ranks"
    assert rank.gathered_bytes == 2 * of_tp_rank
    assert rank.optimizer_bytes == 2 * rank.parameter_bytes
    first, last = planned("ep beside pp", tmp_path).ranks
    expert, attention, router = 3 * 24 * 16, 2 * 16 * 16 + 2 * 8 * 16, 4 * 16
    of_block = 4 * expert + attention + router + 2 * norm
    assert (
        first.parameter_bytes == 4 * (of_block + table) // 2 and last.parameter_bytes == 4 * (of_block + table + norm) // 2
    )
    assert first.gathered_bytes == 4 * (of_block + table - 2 * expert), "two of four experts are another rank's"
