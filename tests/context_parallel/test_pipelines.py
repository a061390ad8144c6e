"""Steps on meshes with a cp axis match one process: models of stages/ and captured ones, in both engines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import autofunc as af
from autofunc.errors import AutofuncError
from autofunc.mesh import data_coordinate
from autofunc.tree import flatten
from stages.gpt2 import build_gpt2_model
from stages.llama import build_llama_model
from tests.cases import cut_evenly, mesh_of
from tests.pool import WorkerPool
from tests.shard import spread_models

ROWS, TOKENS, MICROBATCHES, MAX_NORM = 8, 16, 4, 0.5


def build(name: str) -> af.Model:
    if name == "gpt2":  # with all dropouts
        return build_gpt2_model(
            vocab_size=20, n_positions=TOKENS, n_embd=8, n_layer=2, n_head=2, embd_pdrop=0.1, attn_pdrop=0.1,
            resid_pdrop=0.1,
        )  # fmt: skip
    if name == "llama":
        return build_llama_model(
            vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
        )  # fmt: skip
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 20}
    if name == "captured bert":
        module: Any = transformers.BertForMaskedLM(transformers.BertConfig(**sizes, max_position_embeddings=TOKENS))
    elif name == "captured olmoe":  # with its balance loss, which ignores padding
        module = spread_models.model_of("olmoe", **sizes)
    elif name == "captured llama":
        config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, use_cache=False, bos_token_id=1, eos_token_id=2)
        module = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.GPT2Config(
            n_embd=8, n_layer=2, n_head=2, vocab_size=20, n_positions=TOKENS, use_cache=False, bos_token_id=1,
            eos_token_id=2, loss_type="ForCausalLM",
        )  # fmt: skip
        module = transformers.GPT2LMHeadModel(config)
    return af.from_module(module.train(), batch_of(name))


def batch_of(name: str) -> dict[str, Tensor]:
    ids = torch.randint(1, 20, (ROWS, TOKENS + 1), generator=torch.Generator().manual_seed(0))
    shift = not name.startswith("captured")  # these shift labels themselves
    labels = ids[:, shift : TOKENS + shift].clone()
    labels[::2, -5:] = -100
    batch = {"input_ids": ids[:, :-1], "labels": labels}
    if name in ("captured bert", "captured olmoe"):
        batch["attention_mask"] = (torch.arange(TOKENS) < torch.arange(9, 17)[:, None]).long()
    return batch


def train(
    name: str, schedule: str, axes: dict[str, int], options: dict[str, Any], sharding: dict[str, Any], steps: int
) -> tuple[list[float], dict[str, Tensor], Tensor]:
    """Losses and norms of some steps, then all parameters, and the first row's outputs."""
    mesh = mesh_of(**axes) if axes else None
    place, dp = data_coordinate(mesh)
    s = af.schedule.build(schedule, num_ranks=axes.get("pp", 1), num_microbatches=MICROBATCHES // dp)
    loss = None if name.startswith("captured") else af.losses.causal_lm
    stages = cut_evenly(build(name), s.num_stages)
    pipe = af.pipeline(stages, s, loss=loss, mesh=mesh, sharding=af.Sharding(**sharding), **options)
    params = pipe.init()
    optimizer = af.optimizer(torch.optim.AdamW, lr=1e-3)
    state, batch, found = optimizer.init(params), batch_of(name), []
    own = {entry: rows.chunk(dp)[place] for entry, rows in batch.items()}
    for step in range(steps):
        value, grads = af.value_and_grad(pipe)(params, own, key=(0, step))
        grads, norm = pipe.clip(grads, MAX_NORM)
        params, state = optimizer.update(grads, state, params)
        found += [value.item(), norm.item()]
    outputs = pipe.forward(params, own, gather="all")
    logits = outputs if isinstance(outputs, Tensor) else outputs["logits"]
    return found, flatten(pipe.gather(params)), logits[:1] if place == 0 else torch.empty(0)


CASES = [
    ("llama", "zbv", {"pp": 2, "cp": 2}, {}, {"context_parallel": "ring"}),
    ("captured bert", "1f1b", {"pp": 2, "cp": 2}, {"engine": "eager"}, {}),
    ("captured gpt2", "1f1b", {"dp_replicate": 2, "cp": 2}, {}, {}),
    ("llama", "1f1b", {"cp": 2, "tp": 2}, {}, {"context_parallel": "ring"}),
]
MORE = [
    ("llama", "1f1b", {"cp": 4}, {"remat": "layer"}, {"reshard_after_forward": True}),
    ("llama", "1f1b", {"dp_shard": 2, "cp": 2}, {"engine": "eager", "remat": "stage"}, {"context_parallel": "ring"}),
    ("gpt2", "zbv", {"pp": 2, "cp": 2}, {}, {}),
    ("gpt2", "1f1b", {"dp_shard": 2, "cp": 2}, {"engine": "eager"}, {"context_parallel": "ring"}),
    ("captured llama", "zb_h1", {"pp": 2, "cp": 2}, {}, {"context_parallel": "ring"}),
    ("captured llama", "1f1b", {"pp": 2, "cp": 2}, {"engine": "eager"}, {}),
    ("llama", "1f1b", {"pp": 2, "cp": 2}, {"compile": True}, {}),
    ("captured bert", "1f1b", {"cp": 4}, {}, {"context_parallel": "ring"}),
    ("captured gpt2", "1f1b", {"cp": 2, "tp": 2}, {}, {}),
    ("llama", "1f1b", {"cp": 2, "tp": 2}, {"engine": "eager"}, {}),
    ("gpt2", "1f1b", {"cp": 2, "tp": 2}, {"remat": "layer"}, {}),
    ("captured olmoe", "1f1b", {"pp": 2, "cp": 2}, {}, {}),
    ("captured olmoe", "zbv", {"pp": 2, "cp": 2}, {}, {"context_parallel": "ring"}),
    ("captured olmoe", "1f1b", {"pp": 2, "cp": 2}, {"engine": "eager"}, {}),
    ("captured olmoe", "1f1b", {"cp": 2, "tp": 2}, {}, {}),
    ("captured bert", "1f1b", {"cp": 2, "tp": 2}, {"engine": "eager"}, {"context_parallel": "ring"}),
]


@pytest.mark.parametrize(
    ("name", "schedule", "axes", "options", "sharding"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.full) for case in MORE)],
)
def test_five_steps_match_one_process(
    workers: WorkerPool, name: str, schedule: str, axes: dict[str, int], options: dict[str, Any], sharding: dict[str, Any]
) -> None:
    matches_one_process(workers, name, schedule, axes, options, sharding)


def steps_of(name: str, axes: dict[str, int], method: str) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of some steps of a transformers module, then its parameters."""
    mesh = mesh_of(**axes) if axes else None
    place, dp = data_coordinate(mesh)
    batch = spread_models.batch_of(name)
    model = af.from_module(spread_models.model_of(name).train(), batch)
    s = af.schedule.build("1f1b", num_ranks=1, num_microbatches=2 // dp)
    pipe = af.pipeline(af.split(model, 1), s, mesh=mesh, sharding=af.Sharding(context_parallel=method))
    params = pipe.init()
    optimizer = af.optimizer(torch.optim.AdamW, lr=1e-3)
    state, losses = optimizer.init(params), []
    own = {entry: rows.chunk(dp)[place] for entry, rows in batch.items()}
    for step in range(5):
        loss, grads = af.value_and_grad(pipe)(params, own, key=(0, step))
        params, state = optimizer.update(grads, state, params)
        losses.append(loss.item())
    return losses, flatten(pipe.gather(params))


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("qwen3", "ring"), ("phi3", "allgather"), ("gemma3", "ring"), ("t5", "ring"), ("t5", "allgather"),
        ("mixtral", "ring"), ("qwen3_moe", "allgather"),
    ],
)  # fmt: skip
def test_more_models_of_transformers(workers: WorkerPool, name: str, method: str) -> None:
    """Grouped heads, fused weights, sliding windows, a trained bias, and two sequences."""
    losses, params = steps_of(name, {}, method)
    for found, full in workers.run(steps_of, name, {"dp_replicate": 2, "cp": 2}, method):
        torch.testing.assert_close(found, losses, rtol=1e-5, atol=1e-5)
        for path, leaf in params.items():
            torch.testing.assert_close(full[path], leaf, rtol=0, atol=1e-5, msg=lambda text, path=path: f"{path}: {text}")


@pytest.mark.parametrize(
    ("name", "schedule", "options", "sharding"),
    [
        ("captured llama", "1f1b", {}, {"context_parallel": "ring"}),
        pytest.param("captured llama", "zbv", {}, {}, marks=pytest.mark.full),
        pytest.param("captured llama", "1f1b", {"engine": "eager"}, {}, marks=pytest.mark.full),
        pytest.param("gpt2", "zb_h1", {}, {}, marks=pytest.mark.full),
    ],
)
def test_with_tp_on_eight_processes(
    eight_workers: WorkerPool, name: str, schedule: str, options: dict[str, Any], sharding: dict[str, Any]
) -> None:
    matches_one_process(eight_workers, name, schedule, {"pp": 2, "cp": 2, "tp": 2}, options, sharding)


def matches_one_process(
    workers: WorkerPool, name: str, schedule: str, axes: dict[str, int], options: dict[str, Any], sharding: dict[str, Any]
) -> None:
    """Compare the results of all processes with those of one."""
    expected, params, outputs = train(name, "gpipe", {}, {"engine": "eager"}, {}, 5)
    for found, full, logits in workers.run(train, name, schedule, axes, options, sharding, 5):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        for path, leaf in params.items():
            torch.testing.assert_close(full[path], leaf, rtol=0, atol=1e-5, msg=lambda text, path=path: f"{path}: {text}")
        if logits.numel():
            torch.testing.assert_close(logits, outputs, rtol=1e-4, atol=1e-4)


# --- aux of a loss, and refusals


@af.losses.reduce_aux(most="max", predictions="cat", share="mean")
def with_aux(outputs: Tensor, microbatch: Any) -> Any:
    total, weight = af.losses.causal_lm(outputs, microbatch)
    found = outputs.detach().argmax(-1)
    right = (found == microbatch["labels"]).sum()
    most, share = outputs.detach().amax(), right / found.numel()
    return total, weight, {"right": right, "most": most, "predictions": found, "share": share}


def aux_of(axes: dict[str, int]) -> dict[str, Tensor]:
    mesh = mesh_of(**axes) if axes else None
    place, dp = data_coordinate(mesh)
    s = af.schedule.build("1f1b", num_ranks=1, num_microbatches=MICROBATCHES // dp)
    pipe = af.pipeline(af.split(build("llama")), s, loss=with_aux, mesh=mesh)
    own = {entry: rows.chunk(dp)[place] for entry, rows in batch_of("llama").items()}
    (_, aux), _ = af.value_and_grad(pipe, has_aux=True)(pipe.init(0), own)
    return dict(aux)


def test_aux_counts_rows_once(workers: WorkerPool) -> None:
    expected = aux_of({})
    for found in workers.run(aux_of, {"dp_shard": 2, "cp": 2}):
        torch.testing.assert_close(found, expected)


def message_for(what: str) -> str:
    mesh = mesh_of(dp_shard=2, cp=2)
    model, s = build("llama"), af.schedule.build("1f1b", num_ranks=1, num_microbatches=2)
    batch = batch_of("llama")
    if what == "length":
        batch = {entry: rows[:, :14] for entry, rows in batch.items()}

    def loss(outputs: Tensor, microbatch: Any) -> Tensor:
        return functional.cross_entropy(outputs[:, :-1].flatten(0, 1), microbatch["labels"][:, 1:].flatten())

    try:
        pipe = af.pipeline(af.split(model), s, loss=loss if what == "loss" else af.losses.causal_lm, mesh=mesh)
        af.value_and_grad(pipe)(pipe.init(0), batch)
    except AutofuncError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("length", "14 tokens, which cp=2 ranks cannot cut into 4 equal chunks (two a rank); pad it to a multiple of 4"),
        ("loss", "the loss runs aten.slice.Tensor"),
    ],
)
def test_refusals(workers: WorkerPool, what: str, expected: str) -> None:
    for message in workers.run(message_for, what):
        assert expected in message
