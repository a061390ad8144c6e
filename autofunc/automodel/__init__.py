"""Models by architecture name: registered ones and those of transformers, with and without weights."""

from autofunc.automodel.auto_model import AutoModel
from autofunc.automodel.modeling_path import register_modeling_path
from autofunc.automodel.registry import known_architectures, register_architecture
from autofunc.automodel.write import check_writable, write_pretrained

__all__ = [
    "AutoModel",
    "check_writable",
    "known_architectures",
    "register_architecture",
    "register_modeling_path",
    "write_pretrained",
]
