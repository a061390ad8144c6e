"""The tokenizer of a run: its dataset's, written into the exported folder too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autofunc.data import TextTokenizer
from autofunc.train.labels import inside

_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
"""Files of an earlier export, which would change the tokenizer that transformers loads."""


def tokenizer_in(dataset: Any) -> TextTokenizer | None:
    """Return the attribute `tokenizer` of a dataset, or of one that it wraps; None if there is none."""
    for each in inside(dataset):
        found: Any = getattr(each, "tokenizer", None)
        if callable(getattr(found, "encode", None)) and callable(getattr(found, "decode", None)):
            tokenizer: TextTokenizer = found
            return tokenizer
    return None


def keep_tokenizer(dataset: Any, folder: Path) -> None:
    """Write a dataset's tokenizer into a folder with weights, if transformers can load it from there.

    For byte tokens, delete the tokenizer of an earlier export. Without a known tokenizer, leave the folder unchanged.
    """
    found: Any = tokenizer_in(dataset)
    if found is None:
        return
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
    save = getattr(found, "save_pretrained", None)
    if callable(save):
        save(folder)
