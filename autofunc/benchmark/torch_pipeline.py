"""A torch contender: `torch.distributed.pipelining` on our stages, used as its documentation shows.

Shapes are given ahead of time, no outputs are kept, and the loss is a mean over all microbatches. Gradients of a parameter
that two stages share are summed at the end of a step, which torch leaves to its users.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

from autofunc.benchmark.torch_stage import Ends
from autofunc.schedule import Action, Kind

Recorded = list[tuple[Action, float, float]]
"""A rank's actions with their start and end, in seconds."""


class TorchPipeline:
    """A torch schedule on this process's stages.

    Args:
        name: torch's name of the schedule.
        modules: this process's modules by stage number, see `StageModule`.
        ends: boundaries of these stages.
        num_stages: stages of all processes.
        microbatches: microbatches per step.
        entries: keyword arguments of all modules for a whole step, see `torch_stage.stacked`.
        device: the device this process computes on.
        group: the group of the pp ranks.
        compiled: run each module through `torch.compile`.
        canonical: holder -> canonical path.
        shared: canonical paths that several layers use, each with the group of processes that do; None: only this process.

    Raises:
        Exception: whatever torch raises for stages it does not take.
    """

    def __init__(
        self, name: str, modules: Mapping[int, nn.Module], ends: Mapping[int, Ends], num_stages: int, microbatches: int,
        entries: Mapping[str, Tensor], device: torch.device, group: dist.ProcessGroup | None, compiled: bool,
        canonical: Mapping[str, str], shared: Mapping[str, dist.ProcessGroup | None],
    ) -> None:  # fmt: skip
        self._modules, self._entries, self._canonical, self._shared = modules, entries, canonical, shared
        self._is_last = num_stages - 1 in modules
        self._target = torch.empty(microbatches)  # unused: the last module computes the loss, but torch needs a target
        self._weights: list[Tensor] = []
        self._total: Tensor | None = None
        self.stages = [
            PipelineStage(
                _called(module, compiled),
                number, num_stages, device, input_args=ends[number].inputs, output_args=ends[number].outputs, group=group,
            )
            for number, module in modules.items()
        ]  # fmt: skip
        kind: Callable[..., Any] = get_schedule_class(name)
        several = issubclass(get_schedule_class(name), PipelineScheduleMulti)
        self._schedule = kind(
            self.stages if several else self.stages[0], microbatches, loss_fn=self._loss, scale_grads=False
        )  # fmt: skip

    def _loss(self, made: Sequence[Tensor], _: Tensor) -> Tensor:
        """Return a microbatch's share of the mean; in the first step, which sums up the batch's weight, its sum."""
        if self._total is None:
            self._weights.append(made[1].detach())
            return made[0]
        return made[0] / self._total

    def step(self) -> None:
        """Fill `.grad` with the gradients of the mean loss; in the first step, of the sum."""
        self.drop()
        losses: list[Tensor] = []
        target = self._target if self._is_last else None
        self._schedule.step(**self._entries, target=target, losses=losses, return_outputs=False)
        if self._total is None and self._is_last:
            self._total = torch.stack(self._weights).sum()
        for path, group in self._shared.items():
            _sum_ties([leaf for holder, leaf in self._leaves() if self._canonical[holder] == path], group)

    def drop(self) -> None:
        """Release the gradients of the last step."""
        for module in self._modules.values():
            module.zero_grad(set_to_none=True)

    def grads(self) -> dict[str, Tensor]:
        """Return the gradients of the last step by canonical path."""
        return {self._canonical[path]: leaf.grad for path, leaf in self._leaves() if leaf.grad is not None}

    def _leaves(self) -> list[tuple[str, nn.Parameter]]:
        made: Any = list(self._modules.values())
        return [pair for module in made for pair in module.holders.items()]

    def buffer_bytes(self) -> int:
        """Return the bytes of torch's receive buffers, one per microbatch, which it keeps from step to step."""
        kept: dict[int, int] = {}
        for stage in self.stages:
            for infos in (*stage.args_recv_info.values(), *stage.grad_recv_info.values()):
                for info in infos:
                    if info.buffer is not None:
                        storage = info.buffer.untyped_storage()
                        kept[storage.data_ptr()] = storage.nbytes()
        return sum(kept.values())

    def recorded_step(self) -> Recorded:
        """Run a step, timing each action by `time.perf_counter`. On a GPU the host waits for each of them."""
        found: Recorded = []
        device = self.stages[0].device

        def timed(stage: Any, name: str, kind_of: Callable[[Mapping[str, Any]], Kind]) -> None:
            method = getattr(stage, name)

            def run(microbatch: int, *given: Any, **named: Any) -> Any:
                began = time.perf_counter()
                made = method(microbatch, *given, **named)
                if device.type != "cpu":
                    torch.accelerator.synchronize(device)
                action = Action(stage.stage_index, kind_of(named), microbatch)
                found.append((action, began, time.perf_counter()))
                return made

            setattr(stage, name, run)

        for stage in self.stages:
            timed(stage, "forward_one_chunk", lambda named: Kind.F)
            timed(stage, "backward_one_chunk", lambda named: Kind.B if named.get("full_backward", True) else Kind.I)
            timed(stage, "backward_weight_one_chunk", lambda named: Kind.W)
        try:
            self.step()
        finally:
            for stage in self.stages:
                for name in ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk"):
                    delattr(stage, name)
        return found


def _called(module: nn.Module, compiled: bool) -> Any:
    return torch.compile(module, dynamic=False) if compiled else module


def _sum_ties(leaves: Sequence[nn.Parameter], group: dist.ProcessGroup | None) -> None:
    """Give all holders of a parameter the sum of their gradients."""
    if not leaves:
        return
    total = leaves[0].grad
    assert total is not None, "the holders of a tied parameter are trained"
    for leaf in leaves[1:]:
        assert leaf.grad is not None, "the holders of a tied parameter are trained"
        total += leaf.grad
    if group is not None:
        dist.all_reduce(total, group=group)
    for leaf in leaves[1:]:
        leaf.grad = total
