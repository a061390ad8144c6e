"""A stage computed by several processes together: its function sees DTensors, everything outside sees local tensors.

DTensor decides the placement of values operator by operator, and inserts the collectives. In the graph engine that happens
once, while the stage is captured: what runs are local operators and collectives.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, fx
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import implicit_replication, register_sharding

from autofunc.cache import Identity
from autofunc.errors import ModelError
from autofunc.losses import IGNORED
from autofunc.shard.dtensors import settled
from autofunc.shard.exchange import exchange_directly
from autofunc.shard.group_axis import GroupAxis
from autofunc.shard.masks import masks_let_go
from autofunc.spread import SEQUENCE_DIM, sharded_dim, spreading
from autofunc.spreading.entropy import cross_entropy_sum


class OverTP:
    """A `splitting.Partitioning`, and a `spread.Spread`, over a tp axis.

    Args:
        mesh: the tp axis.
        dims: path of a holder -> the dim along which its parameter is cut; others are whole.
        sequence_parallel: what "sequence" means, see `spread.constrain`.
    """

    over = None
    over_tp = True

    def __init__(self, mesh: DeviceMesh, dims: Mapping[str, int], sequence_parallel: bool) -> None:
        _register_attention()
        self.mesh, self.dims, self.sequence_parallel = mesh, dims, sequence_parallel
        self.size = mesh.size()

    # --- Partitioning

    @property
    def fingerprint(self) -> Hashable:
        """Identifies the group whose collectives a captured stage names, and what "sequence" means."""
        return Identity(self.mesh.get_group()), self.sequence_parallel

    def shape(self, path: str, shape: torch.Size) -> torch.Size:
        """See `Partitioning.shape`."""
        dim = self.dims.get(path)
        if dim is None:
            return shape
        return torch.Size([*shape[:dim], shape[dim] // self.size, *shape[dim + 1 :]])

    @contextmanager
    def running(self) -> Iterator[None]:
        """See `Partitioning.running`. Tensors computed from the batch alone are the same on every rank."""
        with implicit_replication(), spreading(self), masks_let_go():
            try:
                yield
            except NotImplementedError as error:  # of DTensor, about an operator
                if "sharding strategy" in str(error):
                    error.args = (f"{error} Use tp=1, or af.from_function, whose graph computes it whole on every rank",)
                raise

    def parameter(self, path: str, local: Tensor) -> Tensor:
        """See `Partitioning.parameter`."""
        return self._over(local.detach(), self._placement(path))

    def received(self, local: Tensor, placement: Hashable) -> Tensor:
        """See `Partitioning.received`."""
        return local if placement is None else self._over(local, placement)  # type: ignore[arg-type]

    def handed_on(self, value: Tensor, placement: Hashable = None) -> tuple[Tensor, Hashable]:
        """See `Partitioning.handed_on`. Partial sums are summed."""
        if not isinstance(value, DTensor):
            return value, None
        own = value.placements[0]
        target = placement or (own if isinstance(own, (Shard, Replicate)) else Replicate())
        return self._local(value, target), target  # type: ignore[arg-type]

    def whole(self, value: Tensor) -> Tensor:
        """See `Partitioning.whole`."""
        return self._local(value, Replicate()) if isinstance(value, DTensor) else value

    def gradient(self, path: str, gradient: Tensor) -> tuple[Tensor, bool]:
        """See `Partitioning.gradient`. Partial sums stay partial: they are summed once per step."""
        if not isinstance(gradient, DTensor):
            return gradient, False
        own, wanted = gradient.placements[0], self._placement(path)
        if own.is_partial("sum") and isinstance(wanted, Replicate):
            return settled(gradient.to_local()), True
        return self._local(gradient, wanted), False

    def refine(self, graph: fx.Graph) -> None:
        """See `Partitioning.refine`."""
        exchange_directly(graph, self.mesh.get_group())

    # --- Spread

    def constrain(self, x: Tensor, placement: str) -> Tensor:
        """See `spread.constrain`."""
        sequence = SEQUENCE_DIM if self.sequence_parallel else None
        dim = sequence if placement == "sequence" else sharded_dim(placement)
        if not isinstance(x, DTensor):
            if dim is None:
                return x
            x = self._over(x, Replicate())
        if dim is None:
            return x.redistribute(placements=[Replicate()])
        if dim >= x.dim() or x.shape[dim] % self.size:
            raise _uneven(x, dim, self.size, placement)
        return x.redistribute(placements=[Shard(dim)])

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor | None:
        """See `Spread.cross_entropy`."""
        if not isinstance(logits, DTensor) or logits.placements[0] != Shard(logits.dim() - 1):
            return None
        own = self._local(logits, logits.placements[0])
        return cross_entropy_sum(own, self.whole(labels), GroupAxis(self.mesh), IGNORED)

    # --- helpers

    def _placement(self, path: str) -> Placement:
        dim = self.dims.get(path)
        return Replicate() if dim is None else Shard(dim)

    def _over(self, local: Tensor, placement: Placement) -> DTensor:
        return DTensor.from_local(local, self.mesh, [placement], run_check=False)

    def _local(self, value: DTensor, placement: Placement) -> Tensor:
        if value.placements[0] != placement:
            value = value.redistribute(placements=[placement])
        return settled(value.to_local())


def _uneven(x: Tensor, dim: int, size: int, placement: str) -> ModelError:
    whole = x.shape[dim] if dim < x.dim() else 0
    if placement != "sequence" or not whole:
        return ModelError(
            f"constrain: a value of shape {tuple(x.shape)} cannot be cut into {size} equal parts along dim {dim}; give one "
            "whose dim tp divides, or 'replicate'"
        )
    nearest = " or ".join(str(near) for near in (whole // size * size, (whole // size + 1) * size) if near)
    return ModelError(
        f"sequence_parallel cuts tokens over tp={size} ranks, which cannot share {whole} tokens equally; use {nearest} "
        "tokens, or leave it out"
    )


@cache
def _register_attention() -> None:
    """Tell DTensor how attention on CPU is sharded: by heads (dim 1), or not at all. It knows attention on CUDA.

    DTensor has one table of operators for the whole process, to which this adds; so it runs once, and only if a tp
    axis is used.
    """
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    @register_sharding(attention.default)
    def _(q, k, v, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):  # type: ignore[no-untyped-def]
        return [([p] * 2, [p] * 3 + [None] * 2) for p in (Replicate(), Shard(1))]

    @register_sharding(backward.default)
    def _(grad, q, k, v, out, logsumexp, dropout_p, is_causal, *, attn_mask=None, scale=None):  # type: ignore[no-untyped-def]
        return [([p] * 3, [p] * 6 + [None] * 2) for p in (Replicate(), Shard(1))]
