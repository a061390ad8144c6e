"""Models as named pure layers."""

from autofunc.model.cache_form import CacheForm
from autofunc.model.chain import Model
from autofunc.model.cut_points import CutPoints
from autofunc.model.layer import Layer
from autofunc.model.placement_rules import TensorParallel, cut_dims, patterns_like
from autofunc.model.specialised import Specialised
from autofunc.model.state import State, StatefulFunction, check_state, given_state

__all__ = [
    "CacheForm",
    "CutPoints",
    "Layer",
    "Model",
    "Specialised",
    "State",
    "StatefulFunction",
    "TensorParallel",
    "check_state",
    "cut_dims",
    "given_state",
    "patterns_like",
]
