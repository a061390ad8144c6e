"""Models as named pure layers."""

from autofunc.model.chain import Model
from autofunc.model.layer import Layer

__all__ = ["Layer", "Model"]
