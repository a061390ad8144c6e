"""The same GPT-2 twice: as an `af.Model`, and as `torch.distributed.pipelining` stages that read its parameters.

The torch side is what its documentation asks for: one `nn.Module` a stage, shapes given ahead of time, no outputs kept.
Both sides run the same operators, with q, k and v as three weights, so that a comparison is one of engines and runtimes
and not of models. The head has its own weight, because torch's pipelining has no tied ones.

Run as a script it checks the twins: equal logits on one microbatch, and on two gloo processes equal losses and gradients
under every schedule of torch.

Run: python bench/torch_model.py
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class
from torch.nn import functional

import autofunc as af
from autofunc.tree import flatten
from stages.gpt2 import GPT2Config, build_gpt2_model

# torch's schedule -> (stages a rank, whether they lie in a V)
TORCH_SCHEDULES = {
    "GPipe": (1, False),
    "1F1B": (1, False),
    "Interleaved1F1B": (2, False),
    "LoopedBFS": (2, False),
    "InterleavedZeroBubble": (2, False),
    "ZBVZeroBubble": (2, True),
    "DualPipeV": (2, True),
}
COMPILABLE = ("GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS")  # torch refuses compiled modules where I and W are apart
TOLERANCE = 1e-5


def untied_gpt2(vocab: int, positions: int, features: int, blocks: int, heads: int) -> af.Model:
    """The GPT-2 of `stages/gpt2.py`, with a weight of its own in the head."""
    tied = build_gpt2_model(vocab_size=vocab, n_positions=positions, n_embd=features, n_layer=blocks, n_head=heads)
    layers = dict(tied.layers)
    layers["head"] = af.Layer(
        init=lambda key: {"weight": key.normal("weight", (vocab, features), std=0.02)}, apply=tied.layers["head"].apply
    )
    return af.Model(layers, config=tied.config)


def cut(model: af.Model, num_stages: int) -> list[Any]:
    """The model's stages with equally many blocks each."""
    each, rest = divmod(model.config.n_layer, num_stages)
    if rest:
        raise ValueError(f"{model.config.n_layer} blocks do not divide into {num_stages} stages")
    return af.split(model, [f"h.{index * each}" for index in range(1, num_stages)])


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of one microbatch; torch calls it with (output, target)."""
    return functional.cross_entropy(logits.flatten(0, -2), labels.flatten())


def mean_loss_of(outputs: Tensor, microbatch: Mapping[str, Any]) -> Tensor:
    """The same for autofunc: a scalar weighs 1, so the step's loss is the mean over microbatches, as torch scales it."""
    return mean_loss(outputs, microbatch["labels"])


class Block(nn.Module):
    """One block. Parameters are attributes of the block itself: submodules would only add calls."""

    def __init__(self, leaves: Mapping[str, nn.Parameter], config: GPT2Config) -> None:
        super().__init__()
        for path, leaf in leaves.items():
            self.register_parameter(path.replace(".", "_"), leaf)
        self.heads, self.shape, self.eps = config.n_head, (config.n_embd,), config.layer_norm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to the same."""
        rows, tokens, features = x.shape
        heads = (rows, tokens, self.heads, features // self.heads)
        y = functional.layer_norm(x, self.shape, self.ln_1_weight, self.ln_1_bias, self.eps)
        q = functional.linear(y, self.attn_q_weight, self.attn_q_bias).view(heads).transpose(1, 2)
        k = functional.linear(y, self.attn_k_weight, self.attn_k_bias).view(heads).transpose(1, 2)
        v = functional.linear(y, self.attn_v_weight, self.attn_v_bias).view(heads).transpose(1, 2)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + functional.linear(y, self.attn_proj_weight, self.attn_proj_bias)
        y = functional.layer_norm(x, self.shape, self.ln_2_weight, self.ln_2_bias, self.eps)
        y = functional.gelu(functional.linear(y, self.mlp_fc_weight, self.mlp_fc_bias), approximate="tanh")
        return x + functional.linear(y, self.mlp_proj_weight, self.mlp_proj_bias)


class TorchStage(nn.Module):
    """The layers of one stage. `by_path` holds its parameters under autofunc's paths.

    Args:
        layers: names of consecutive layers of `untied_gpt2`.
        params: tensors by path; copied.
        config: of the model.
    """

    def __init__(self, layers: Sequence[str], params: Mapping[str, Tensor], config: GPT2Config) -> None:
        super().__init__()
        self.by_path = {
            path: nn.Parameter(leaf.detach().clone())
            for path, leaf in params.items()
            if any(path.startswith(f"{name}.") for name in layers)
        }
        self.is_first, self.is_last = "wte" in layers, "head" in layers
        self.shape, self.eps = (config.n_embd,), config.layer_norm_epsilon
        for path in ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias", "head.weight"):
            if path in self.by_path:
                self.register_parameter(path.replace(".", "_"), self.by_path[path])
        blocks = [f"{name}." for name in layers if name.startswith("h.")]
        own = [
            {path.removeprefix(name): leaf for path, leaf in self.by_path.items() if path.startswith(name)}
            for name in blocks
        ]
        self.blocks = nn.ModuleList(Block(leaves, config) for leaves in own)

    def forward(self, x: Tensor) -> Tensor:
        """Token ids (B, T) or features (B, T, D) to features or logits (B, T, V)."""
        if self.is_first:
            x = functional.embedding(x, self.wte_weight) + self.wpe_weight[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        if self.is_last:
            x = functional.layer_norm(x, self.shape, self.ln_f_weight, self.ln_f_bias, self.eps)
            x = functional.linear(x, self.head_weight)
        return x


def stage_numbers(rank: int, ranks: int, stages_per_rank: int, in_v: bool) -> list[int]:
    """The stages of a rank: in a loop (r, r + p, ...), or in a V (r, 2p - 1 - r)."""
    return [rank, 2 * ranks - 1 - rank] if in_v else list(range(rank, ranks * stages_per_rank, ranks))


class TorchPipeline:
    """A schedule of torch on its modules; pipelines of one placement share them, as they share weights and gradients.

    Args:
        name: one of `TORCH_SCHEDULES`.
        modules: this rank's modules by stage number.
        num_stages: of all ranks.
        microbatches: of a step, one row each.
        ids: the batch, int64 (rows, T), for its shape.
        config: of the model.
        compiled: run each module through `torch.compile`. The loss stays eager: that is faster, it is so small.
    """

    def __init__(
        self, name: str, modules: Mapping[int, TorchStage], num_stages: int, microbatches: int, ids: Tensor,
        config: GPT2Config, compiled: bool,
    ) -> None:  # fmt: skip
        self.modules = modules
        row = ids[: len(ids) // microbatches]
        # Given shapes spare torch the run that finds them out; what crosses must say that it needs a gradient.
        features = torch.empty(*row.shape, config.n_embd, requires_grad=True)
        logits = torch.empty(*row.shape, config.vocab_size, requires_grad=True)
        stages = [
            PipelineStage(
                torch.compile(module, dynamic=False) if compiled else module,
                number,
                num_stages,
                torch.device("cpu"),
                input_args=row if module.is_first else features,
                output_args=logits if module.is_last else features,
            )
            for number, module in modules.items()
        ]
        kind: Callable[..., Any] = get_schedule_class(name)
        is_multi = issubclass(get_schedule_class(name), PipelineScheduleMulti)
        self._schedule = kind(stages if is_multi else stages[0], microbatches, loss_fn=mean_loss)

    def step(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Fill `.grad` with the gradients of the mean loss; returns the loss on the rank that has the last stage."""
        for module in self.modules.values():
            module.zero_grad(set_to_none=True)
        given = [batch["input_ids"]] if 0 in self.modules else []
        losses: list[Tensor] = []
        is_last = any(module.is_last for module in self.modules.values())
        target = batch["labels"] if is_last else None
        self._schedule.step(*given, target=target, losses=losses, return_outputs=False)
        return torch.stack([loss.detach() for loss in losses]).mean() if is_last else None

    def grads(self) -> dict[str, Tensor]:
        """This rank's gradients by autofunc's path."""
        held = {path: leaf.grad for module in self.modules.values() for path, leaf in module.by_path.items()}
        return {path: grad for path, grad in held.items() if grad is not None}


def local_modules(
    model: af.Model, params: Mapping[str, Tensor], rank: int, ranks: int, stages_per_rank: int, in_v: bool
) -> dict[int, TorchStage]:
    """A rank's modules by stage number."""
    stages = cut(model, ranks * stages_per_rank)
    numbers = stage_numbers(rank, ranks, stages_per_rank, in_v)
    return {number: TorchStage(stages[number].layers, params, model.config) for number in numbers}


def error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest norm of a difference of gradients, relative to the norm expected.

    The gradient of a key's bias is zero but for rounding, because softmax ignores what is added to all scores of a query;
    it is held against the query's bias.
    """
    missing = set(found) ^ (set(expected) & set(found))
    if missing or not found:
        raise AssertionError(f"gradients of {sorted(missing)} on one side only")
    scale = {path: expected[path.replace(".k.bias", ".q.bias")].norm() for path in found}
    return max(float((found[path] - expected[path]).norm() / scale[path]) for path in found)


def random_batch(vocab: int, rows: int, tokens: int) -> dict[str, Tensor]:
    """Random tokens and the ones that follow them."""
    ids = torch.randint(0, vocab, (rows, tokens + 1), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}


def check_rank(rank: int, store: str, results: str) -> None:
    """One of two processes: every schedule of torch against the plain loop of autofunc."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    model, rows = untied_gpt2(64, 16, 32, 4, 4), 8
    params, batch = flatten(model.init()), random_batch(64, rows, 16)
    loss, grads = af.reference_value_and_grad(model, mean_loss_of, rows)(params, batch)
    expected = flatten(grads)
    found = []
    for name, (stages_per_rank, in_v) in TORCH_SCHEDULES.items():
        modules = local_modules(model, params, rank, 2, stages_per_rank, in_v)
        for compiled in (False, True) if name in COMPILABLE else (False,):
            pipe = TorchPipeline(name, modules, 2 * stages_per_rank, rows, batch["input_ids"], model.config, compiled)
            value = pipe.step(batch)
            held = {path for module in modules.values() for path in module.by_path}
            worst = error(pipe.grads(), {path: expected[path] for path in held})
            found.append((name, compiled, None if value is None else abs(float(value / loss) - 1), worst))
    torch.save(found, f"{results}.{rank}")
    dist.destroy_process_group()


def main() -> None:
    """Check the twins and print how far they are apart."""
    torch.set_num_threads(1)
    model = untied_gpt2(64, 16, 32, 4, 4)
    params, batch = flatten(model.init()), random_batch(64, 1, 16)
    x = batch["input_ids"]
    with torch.no_grad():
        for stage in cut(model, 4):
            x = TorchStage(stage.layers, params, model.config)(x)
        expected = model(params, batch)
    torch.testing.assert_close(x, expected, rtol=TOLERANCE, atol=TOLERANCE)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(check_rank, (f"{folder}/store", f"{folder}/found"), 2)
        both = zip(*(torch.load(f"{folder}/found.{rank}") for rank in range(2)), strict=True)
        table = Table("schedule", "", "loss differs by", "gradients differ by", title=f"torch {torch.__version__}")
        for rows in both:
            name, compiled = rows[0][:2]
            loss, grads = max(row[2] for row in rows if row[2] is not None), max(row[3] for row in rows)
            table.add_row(name, "compiled" if compiled else "eager", f"{loss:.1e}", f"{grads:.1e}")
            if max(loss, grads) > TOLERANCE:
                raise AssertionError(f"{name}: loss differs by {loss:.1e}, gradients by {grads:.1e}")
    Console().print(f"logits of one microbatch differ by at most {float((x - expected).abs().max()):.1e}")
    Console().print(table)


if __name__ == "__main__":
    main()
