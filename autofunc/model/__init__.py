"""Models as named pure layers."""

from autofunc.model.chain import Model
from autofunc.model.layer import Layer
from autofunc.model.placement_rules import TensorParallel, cut_dims

__all__ = ["Layer", "Model", "TensorParallel", "cut_dims"]
