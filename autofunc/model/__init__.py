"""Models as named pure layers."""

from autofunc.model.chain import Model
from autofunc.model.layer import Layer
from autofunc.model.placement_rules import TensorParallel, cut_dims
from autofunc.model.places import Places
from autofunc.model.specialised import Specialised

__all__ = ["Layer", "Model", "Places", "Specialised", "TensorParallel", "cut_dims"]
