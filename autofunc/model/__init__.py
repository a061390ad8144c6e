"""Models as named pure layers."""

from autofunc.model.chain import Model
from autofunc.model.layer import Layer
from autofunc.model.placement_rules import TensorParallel, cut_dims
from autofunc.model.places import Places

__all__ = ["Layer", "Model", "Places", "TensorParallel", "cut_dims"]
