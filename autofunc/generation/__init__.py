"""Text, token by token: greedy or drawn, with a cache of keys and values that every stage gets and gives back."""

from autofunc.generation.loop import OWN, check_request, generate
from autofunc.generation.sampling import Sampling

__all__ = ["OWN", "Sampling", "check_request", "generate"]
