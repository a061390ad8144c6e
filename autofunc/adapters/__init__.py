"""Low-rank adapters: models with frozen weights and small trainable factors beside them."""

from autofunc.adapters.low_rank import lora, merge_lora
from autofunc.adapters.model import AdaptedModel
from autofunc.adapters.peft_folder import ADAPTER_FILES, save_adapter
from autofunc.adapters.stored_adapter import load_adapter

__all__ = ["ADAPTER_FILES", "AdaptedModel", "load_adapter", "lora", "merge_lora", "save_adapter"]
