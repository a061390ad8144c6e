"""Architectures of the zoo as plain data, and their batches of four rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

VOCABULARY, ROWS, TOKENS, PICTURE = 96, 4, 12, 32
IMAGE = 90
"""The token that stands for a patch of an image."""

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": VOCABULARY,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
SIDES = {
    "d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": VOCABULARY, "max_position_embeddings": 32, "dropout": 0.0,
    "attention_dropout": 0.0, "activation_dropout": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0,
}  # fmt: skip
"""Sizes of an encoder and a decoder, in BART's names."""


class Entry(NamedTuple):
    """One architecture."""

    model: str  # its class in transformers
    options: Mapping[str, Any]  # of its config
    batch: str = "text"  # see `BATCHES`
    is_eval: bool = False  # for what draws, or writes to its parameters, while it trains
    batch_dims: Mapping[str, int | None] | None = None
    own_loss: bool = True  # else a sum of all that it returns, each element weighed


def build(entry: Entry) -> nn.Module:
    """Build the module in train or eval mode, with seeded weights, none of them all zeros or ones."""
    import transformers

    torch.manual_seed(0)
    kind: Any = getattr(transformers, entry.model)
    module: nn.Module = kind(kind.config_class(**entry.options)).train(not entry.is_eval)
    with torch.no_grad():
        for leaf in module.parameters():
            leaf.add_(torch.randn(leaf.shape, generator=torch.Generator().manual_seed(leaf.numel())), alpha=0.02)
    return module


def _ids(seed: int, most: int = IMAGE) -> Tensor:
    return torch.randint(3, most, (ROWS, TOKENS), generator=torch.Generator().manual_seed(seed))


def _normal(*shape: int) -> Tensor:
    return torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(0))


def _mask() -> Tensor:
    mask = torch.ones(ROWS, TOKENS, dtype=torch.long)
    mask[0, 9:] = mask[3, 5:] = 0
    return mask


def _text() -> dict[str, Any]:
    return {"input_ids": _ids(0), "labels": _ids(0)}


def _padded() -> dict[str, Any]:
    return {**_text(), "attention_mask": _mask()}


def _pairs() -> dict[str, Any]:
    return {"input_ids": _ids(0), "attention_mask": _mask(), "decoder_input_ids": _ids(1), "labels": _ids(2)}


def _sentences() -> dict[str, Any]:
    ids = _ids(0)
    ids[:, -1] = 2  # the end, at which a classifier looks
    return {"input_ids": ids, "labels": torch.tensor([0, 2, 1, 2])}


def _pictures() -> dict[str, Any]:
    return {"pixel_values": _normal(3, PICTURE, PICTURE), "labels": torch.tensor([0, 2, 1, 2])}


def _scenes() -> dict[str, Any]:
    return {"pixel_values": _normal(3, PICTURE, PICTURE)}


def _maps() -> dict[str, Any]:
    labels = torch.randint(0, 3, (ROWS, PICTURE, PICTURE), generator=torch.Generator().manual_seed(0))
    return {"pixel_values": _normal(3, PICTURE, PICTURE), "labels": labels}


def _speech() -> dict[str, Any]:
    """Return padded waveforms, each with a padded transcript."""
    mask = torch.ones(ROWS, 400, dtype=torch.long)
    mask[1, 300:] = 0
    labels = torch.randint(1, 20, (ROWS, 5), generator=torch.Generator().manual_seed(0))
    labels[2, 3:] = -100
    return {"input_values": _normal(400), "attention_mask": mask, "labels": labels}


def _spectrum() -> dict[str, Any]:
    return {"input_features": _normal(8, 24), "decoder_input_ids": _ids(1), "labels": _ids(2)}


def _captions(pieces: int = 4) -> dict[str, Any]:
    """Return a text with an image in each row, which takes this many tokens."""
    ids = _ids(0)
    ids[:, 2 : 2 + pieces] = IMAGE
    labels = ids.masked_fill(ids == IMAGE, -100)
    return {"input_ids": ids, "pixel_values": _normal(3, PICTURE, PICTURE), "labels": labels}


def _typed_captions() -> dict[str, Any]:
    captions = _captions()
    return {**captions, "attention_mask": torch.ones(ROWS, TOKENS, dtype=torch.long),
            "token_type_ids": (captions["input_ids"] == IMAGE).long()}  # fmt: skip


def _several() -> dict[str, Any]:
    """Return rows with a list of images, here of one."""
    captions = _captions()
    return {**captions, "pixel_values": captions["pixel_values"][:, None]}


def _patches() -> dict[str, Any]:
    """Return images as patches, all rows' in sequence, with the size of each."""
    captions = _captions()
    pixels = torch.randn(ROWS * 16, 3 * 2 * 8 * 8, generator=torch.Generator().manual_seed(0))
    types = (captions["input_ids"] == IMAGE).int()
    sizes = torch.tensor([[1, 4, 4]] * ROWS)
    return {**captions, "pixel_values": pixels, "image_grid_thw": sizes, "mm_token_type_ids": types}


def _described() -> dict[str, Any]:
    ids = _ids(0)
    ids[:, -1] = 2
    return {"input_ids": ids, "pixel_values": _normal(3, PICTURE, PICTURE), "return_loss": True}


BATCHES: Mapping[str, Callable[[], dict[str, Any]]] = {
    "text": _text, "padded": _padded, "pairs": _pairs, "sentences": _sentences, "pictures": _pictures, "scenes": _scenes,
    "maps": _maps, "speech": _speech, "spectrum": _spectrum, "captions": _captions, "typed_captions": _typed_captions,
    "several": _several, "patches": _patches, "described": _described,
}  # fmt: skip
"""Batch builders by name."""
