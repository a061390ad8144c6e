"""Text generation, token by token: greedy or sampled, with a KV cache that every stage receives and returns."""

from autofunc.generation.loop import OWN, check_request, generate
from autofunc.generation.sampling import Sampling

__all__ = ["OWN", "Sampling", "check_request", "generate"]
