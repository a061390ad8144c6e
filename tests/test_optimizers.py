"""Parameter groups, several optimizers as one, and all of torch.optim on one process and on shards."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import autofunc as af
from autofunc.errors import ModelError
from autofunc.tree import flatten, to_tensordict
from stages.gpt2 import build_gpt2_model
from tests.cases import cut_evenly, mesh_of
from tests.pool import WorkerPool

LR = [0.01, 0.02]
OTHERS = ["wte.*", "wpe.*", "*.bias", "*ln_*"]


def model() -> af.Model:
    return build_gpt2_model(vocab_size=18, n_positions=8, n_embd=6, n_layer=1, n_head=2)


def of_torch(leaves: dict[str, Any], name: str) -> list[torch.optim.Optimizer]:
    """What `KINDS[name]` is with torch alone."""
    matrices = [path for path in leaves if path.startswith("h.") and "ln_" not in path and "bias" not in path]

    def named(paths: Any) -> list[Any]:
        return [leaves[path] for path in paths]

    if name == "Muon":
        rest = [path for path in leaves if path not in matrices]
        return [torch.optim.AdamW(named(rest), lr=LR[0]), torch.optim.Muon(named(matrices), lr=2 * LR[0])]
    if name == "groups":
        wte, ones = ["wte.weight"], [path for path in leaves if leaves[path].dim() < 2]
        rest = [path for path in leaves if path not in (*wte, *ones)]
        groups = [
            {"params": named(wte), "lr": 0.1 * LR[0], "betas": (0.5, 0.9)},
            {"params": named(ones), "weight_decay": 0.0},
            {"params": named(rest)},
        ]
        return [torch.optim.AdamW(groups, lr=LR[0], weight_decay=0.5)]
    return [getattr(torch.optim, name)(list(leaves.values()), **({"lr": LR[0]} | OPTIONS.get(name, {})))]


OPTIONS: dict[str, dict[str, Any]] = {"SGD": {"momentum": 0.9, "nesterov": True}, "Adam": {"amsgrad": True}}
REFUSED = {"LBFGS", "SparseAdam"}
CLASSES = {name for name in torch.optim.__all__ if isinstance(getattr(torch.optim, name), type)}
ALL = sorted(CLASSES - {"Optimizer", "Muon"} - REFUSED)


def of_autofunc(name: str) -> af.Optimizer:
    if name == "Muon":
        others = af.optimizer(torch.optim.AdamW, lr=LR[0], params=OTHERS)
        return af.optimizers(others, af.optimizer(torch.optim.Muon, lr=2 * LR[0]))
    if name == "groups":
        group = {"pattern": "wte.*", "lr_mult": 0.1, "betas": (0.5, 0.9)}
        return af.optimizer(torch.optim.AdamW, lr=LR[0], weight_decay=0.5, decay="matrices", param_groups=[group])
    return af.optimizer(getattr(torch.optim, name), **({"lr": LR[0]} | OPTIONS.get(name, {})))


@cache
def gradients() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    spec = flatten(model().init(device="meta"))
    return [{path: torch.randn(leaf.shape, generator=generator) for path, leaf in spec.items()} for _ in LR]


@cache
def updated_by_torch(name: str) -> dict[str, Tensor]:
    leaves = {path: torch.nn.Parameter(leaf) for path, leaf in flatten(model().init(seed=3)).items()}
    optimizers = of_torch(leaves, name)
    initial = [[group["lr"] for group in each.param_groups] for each in optimizers]
    for lr, grads in zip(LR, gradients(), strict=True):
        for path, leaf in leaves.items():
            leaf.grad = grads[path].clone()
        for each, rates in zip(optimizers, initial, strict=True):
            for group, rate in zip(each.param_groups, rates, strict=True):
                group["lr"] = lr * (rate / LR[0])
            each.step()
    return {path: leaf.detach() for path, leaf in leaves.items()}


def updated(pipe: af.Pipeline, name: str) -> dict[str, Tensor]:
    params, opt = pipe.init(seed=3), of_autofunc(name)
    state = opt.init(params)
    for lr, grads in zip(LR, gradients(), strict=True):
        params, state = opt.update(pipe.place(to_tensordict(grads)), state, params, lr=lr)
    for key, slot in flatten(state).items():
        parts = [leaf for path, leaf in flatten(params).items() if key.endswith(f".{path}") and leaf.shape == slot.shape]
        assert all(type(leaf) is type(slot) for leaf in parts), f"{key} lies as its parameter does"
    return flatten(pipe.gather(params))


NAMES = [*ALL, "Muon", "groups"]


def updated_on_a_mesh(axes: tuple[str, ...], names: list[str]) -> None:
    mesh = mesh_of(**dict.fromkeys(axes, 2)) if axes else None
    s = af.schedule.build("1f1b", num_ranks=2 if not axes or "pp" in axes else 1, num_microbatches=2)
    pipe = af.pipeline(cut_evenly(model(), s.num_stages), s, loss=af.losses.causal_lm, mesh=mesh)
    for name in names:
        found = updated(pipe, name)
        for path, expected in updated_by_torch(name).items():
            assert torch.equal(found[path], expected), f"{axes} {name}: {path}"


def test_every_optimizer_of_torch_on_one_process() -> None:
    assert len(ALL) > 11
    updated_on_a_mesh((), NAMES)


def test_those_that_look_beyond_one_number_on_shards(workers: WorkerPool) -> None:
    workers.run(updated_on_a_mesh, ("pp", "dp_shard"), ["Muon", "Adafactor", "Rprop", "groups"])
    workers.run(updated_on_a_mesh, ("dp_shard", "tp"), ["Muon"])


@pytest.mark.full
def test_every_optimizer_of_torch_on_shards(workers: WorkerPool) -> None:
    workers.run(updated_on_a_mesh, ("pp", "dp_shard"), NAMES)
    workers.run(updated_on_a_mesh, ("dp_replicate", "dp_shard"), NAMES)
    workers.run(updated_on_a_mesh, ("dp_shard", "tp"), NAMES)


def params_of(*paths: str) -> Any:
    return to_tensordict({path: torch.ones(2, 2) if path.endswith("weight") else torch.ones(2) for path in paths})


PATHS = ("wte.weight", "h.0.weight", "h.0.bias")


ADAMW = torch.optim.AdamW


def adamw_with(**group: Any) -> af.Optimizer:
    return af.optimizer(ADAMW, param_groups=[group])


REFUSALS: list[tuple[Any, str]] = [
    (lambda: adamw_with(pattern="wte.weigt"), "wte.weigt. matches none .* did you mean wte.weight"),
    (lambda: adamw_with(lr_mult=2), r"param_groups\[0\] is .* expected a mapping with a pattern"),
    (lambda: adamw_with(pattern="*", beta=2), "no option 'beta'; did you mean betas"),
    (lambda: adamw_with(pattern="*", lr_mult=-1), "lr_mult is -1; expected a number"),
    (lambda: adamw_with(pattern="*", lr_mult=1, lr=1), "has both lr_mult and lr"),
    (lambda: af.optimizer(torch.optim.Rprop, decay="matrices"), "decay='matrices' needs the weight_decay of Rprop"),
    (lambda: af.optimizer(torch.optim.Rprop, param_groups=[{"pattern": "*", "wd_mult": 2}]), "wd_mult needs the weight_d"),
    (lambda: af.optimizer(ADAMW, decay="matrixes"), "did you mean matrices"),
    (lambda: af.optimizer(ADAMW, params="wte.*"), r"expected a list of patterns, such as \['wte.\*'\]"),
    (
        lambda: af.optimizer(torch.optim.Muon),
        "Muon takes only matrices, .* 1 of its parameters: h.0.bias. Give those to another",
    ),
    (lambda: af.optimizer(ADAMW, params=["wte.*"]), "no optimizer takes 'h.0.bias'; known: wte"),
    (lambda: af.optimizers(*[af.optimizer(torch.optim.SGD)] * 2), "none are left for optimizer.SGD"),
    (
        lambda: af.optimizers(af.optimizer(torch.optim.SGD, params=["*"]), af.optimizer(torch.optim.Muon)),
        "no parameter is left for optimizer.Muon",
    ),
    (lambda: af.optimizers(), "optimizers.. needs at least one"),
    (lambda: af.optimizer(torch.optim.SparseAdam), "takes only sparse gradients, .* use torch.optim.Adam"),
    (lambda: af.optimizer(torch.optim.LBFGS), "recomputes the loss in each step"),
]


def test_what_does_not_fit_is_refused() -> None:
    params = flatten(params_of(*PATHS))
    for make, message in REFUSALS:
        with pytest.raises(ModelError, match=message):
            make().check(params)


def test_patterns_are_checked_at_the_start_of_one_process() -> None:
    opt = af.optimizer(torch.optim.AdamW, param_groups=[{"pattern": "h.1.*", "lr_mult": 2.0}])
    with pytest.raises(ModelError, match=r"param_groups pattern 'h.1.\*' matches none .*h.0"):
        opt.init(params_of(*PATHS))


def test_muon_leaves_frozen_vectors_alone() -> None:
    params, opt = params_of(*PATHS), af.optimizer(torch.optim.Muon, lr=0.1)
    state = opt.init(params)
    after, _ = opt.update(to_tensordict({"h.0.weight": torch.eye(2)}), state, params.clone())
    assert not torch.equal(after["h", "0", "weight"], params["h", "0", "weight"])
    assert torch.equal(after["h", "0", "bias"], params["h", "0", "bias"])
    with pytest.raises(ModelError, match="Muon takes only matrices"):
        opt.update(to_tensordict({"h.0.bias": torch.ones(2)}), state, params)


def test_a_learning_rate_keeps_the_ratios() -> None:
    first = af.optimizer(torch.optim.SGD, lr=1.0, params=["h.*"], param_groups=[{"pattern": "*.bias", "lr": 0.5}])
    opt = af.optimizers(first, af.optimizer(torch.optim.SGD, lr=3.0))
    params = params_of(*PATHS)
    after, _ = opt.update(params.clone(), opt.init(params), params.clone(), lr=0.1)
    steps = {path: round(1 - leaf.flatten()[0].item(), 6) for path, leaf in flatten(after).items()}
    assert steps == {"h.0.bias": 0.05, "h.0.weight": 0.1, "wte.weight": 0.3}
    zero = af.optimizers(af.optimizer(torch.optim.SGD, lr=0.0, params=["h.*"]), af.optimizer(torch.optim.SGD, lr=3.0))
    with pytest.raises(ModelError, match="the first not 0"):
        zero.update(params.clone(), zero.init(params), params, lr=0.1)
