"""The tokenizer of a run: that of its dataset, which the folder that the run exports holds too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autofunc.data import TextTokenizer
from autofunc.train.labels import inside

_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
"""What an earlier export may have left, with which transformers would make another tokenizer."""


def tokenizer_in(dataset: Any) -> TextTokenizer | None:
    """What made a dataset's tokens, as far as the dataset, or one inside of it, has it as its attribute `tokenizer`."""
    for each in inside(dataset):
        found: Any = getattr(each, "tokenizer", None)
        if callable(getattr(found, "encode", None)) and callable(getattr(found, "decode", None)):
            tokenizer: TextTokenizer = found
            return tokenizer
    return None


def keep_tokenizer(dataset: Any, folder: Path) -> None:
    """Write a dataset's tokenizer into a folder with weights, where it is one that transformers loads again.

    Bytes leave nothing, and nothing of an earlier export either. Where no tokenizer is known the folder stays as it is.
    """
    found: Any = tokenizer_in(dataset)
    if found is None:
        return
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
    save = getattr(found, "save_pretrained", None)
    if callable(save):
        save(folder)
