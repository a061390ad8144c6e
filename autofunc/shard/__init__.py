"""Sharding: parameters over the dp_shard axis, computations over the tp axis, gradients over all dp ranks."""

from autofunc.shard.options import Sharding

__all__ = ["Sharding"]
