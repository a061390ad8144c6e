"""The demo's GPT-2, for benchmarks of schedules and the runtime: eight microbatches of 4 x 128 tokens."""

from __future__ import annotations

import torch
from torch import Tensor

import autofunc as af
from stages.gpt2 import build_gpt2_model

MICROBATCHES = 8


def demo_gpt2() -> tuple[af.Model, dict[str, Tensor]]:
    """Return a model of 1.85 million parameters (d=192, 4 layers, 256 words), and the batch of a step."""
    model = build_gpt2_model(vocab_size=256, n_positions=128, n_embd=192, n_layer=4, n_head=6)
    ids = torch.randint(0, 256, (4 * MICROBATCHES, 129), generator=torch.Generator().manual_seed(0))
    return model, {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
