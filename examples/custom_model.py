"""A model of one's own, as plain PyTorch. Nothing in it knows of pipelines: examples/custom_model.yaml splits it."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Causal attention and an MLP, each added to the stream."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(rows, tokens, width) -> the same."""
        rows, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(rows, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(y.transpose(1, 2).reshape(rows, tokens, width)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class TinyTransformer(nn.Module):
    """Embedding, blocks, and a head that shares the embedding's weight."""

    def __init__(self, hidden_size: int, num_layers: int, vocab_size: int, max_tokens: int, dropout: float) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, hidden_size), nn.Embedding(max_tokens, hidden_size)
        self.blocks = nn.ModuleList(Block(hidden_size, max(hidden_size // 32, 1), dropout) for _ in range(num_layers))
        self.norm, self.head = nn.LayerNorm(hidden_size), nn.Linear(hidden_size, vocab_size, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Token ids and labels, (rows, tokens) -> logits and the mean loss."""
        x = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return {"loss": functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def build_my_model(
    hidden_size: int = 128, num_layers: int = 4, vocab_size: int = 256, max_tokens: int = 128, dropout: float = 0.1
) -> nn.Module:
    """What examples/custom_model.yaml names; its other keys are the arguments."""
    return TinyTransformer(hidden_size, num_layers, vocab_size, max_tokens, dropout)
