"""Layers that cannot be cut over the requested ranks: heads, tokens, experts; tables that fit nothing."""

from __future__ import annotations


def _over(distributed: str, model: str, more: str = "") -> dict[str, str]:
    """Return a run of one stage of a module of `base.MINE`."""
    return {
        "model": f"{{_target_: 'mine.py:{model}'{more}}}",
        "distributed": f"{{{distributed}, device: cpu}}",
    }


_EXPERTS = {
    "model": "{_target_: stages.moe.build_moe_model, vocab_size: 256, hidden_size: 8, intermediate_size: 8, "
    "num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 2, num_local_experts: 4}",
    "loss_fn": "{_target_: stages.moe.moe_causal_lm}",
    "step_scheduler": "{global_batch_size: 6, local_batch_size: 1, max_steps: 1}",
    "distributed": "{ep_size: 3, device: cpu}",
}

WRONG: list[tuple[dict[str, str] | list[str] | str, ...]] = [
    # heads and features
    (_over("tp_size: 2", "Attends", ", heads: 3"), "tp=2 does not divide 3", "mine.py, line", "unflatten", "do: 1, 3"),
    (_over("tp_size: 5", "Attends"), "tp=5", "5 does not divide 12", "sizes that do: 1, 2, 3, 4, 6, 12"),
    # tokens
    (_over("cp_size: 3", "Attends"), "16 tokens", "cp=3", "12 or 18"),
    (_over("cp_size: 2", "Convolves"), "'conv'", "aten.conv1d", "mine.py, line", "in forward", "cp=1"),
    (_over("cp_size: 2, cp_method: ring", "Flips"), "aten.flip", "mine.py, line", "cp=1"),
    (_over("cp_size: 2, pp_size: 2, split_points: [lstm]", "Recurs"), "'lstm'", "aten.lstm", "mine.py, line", "cp=1"),
    # experts
    (_over("ep_size: 2", "Attends"), "ep_size=2", "no routed experts", "af.routed_experts"),
    (_EXPERTS, "expert_parallel=3 does not divide the 4 experts"),
    # tables
    (_over("tp_size: 2, tp_plan: {'*.kk': colwise}", "Attends"), "'*.kk' matches no parameter", "k.weight"),
    (_over("tp_plan: {'*.kk': colwise}", "Attends"), "'*.kk' matches no parameter"),
    (_over("tp_size: 2, tp_plan: {k: columnwise}", "Attends"), "'k'", "'columnwise'", "did you mean colwise"),
    (_over("tp_size: 2, tp_plan: {k.weight: shard(x)}", "Attends"), "'k.weight'", "shard(x)", "'shard(0)'"),
    (_over("tp_size: 2, tp_plan: {}", "Attends"), "nothing in Attends can be cut", "tp=1"),
    (_over("tp_size: 2, tp_plan: own", "Attends"), "no tensor parallel plan of its own", '"derived"'),
    (_over("tp_size: 2, tp_plan: auot", "Attends"), "distributed.tp_plan", "'auot'", "did you mean auto"),
    (_over("tp_size: 2, tp_plan: mien.py:plan", "Attends"), "distributed.tp_plan", "no file 'mien.py'", "mine.py"),
    (_over("tp_size: 2, tp_plan: 'mine.py:plam'", "Attends"), "distributed.tp_plan", "'plam'", "did you mean plan"),
]
