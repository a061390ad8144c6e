"""Generated texts: the request, prompts as tokens, and the output."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autofunc.errors import ConfigError, DataError
from autofunc.shown import printable, quoted, shown

if TYPE_CHECKING:
    from autofunc.data import TextTokenizer

BYTES = "bytes"
"""Name of the tokenizer that uses the bytes of a text."""


@dataclass(frozen=True)
class TextsWanted:
    """The request of `autofunc generate`, see `af.generate`."""

    prompts: tuple[str, ...]
    max_new_tokens: int
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    tokenizer: str | None = None  # a name or folder; None uses the one of the dataset or of the model's folder
    as_json: bool = False

    @property
    def sampling(self) -> dict[str, Any]:
        """Return the arguments of `Sampling`."""
        return {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "seed")}


@dataclass(frozen=True)
class MadeText:
    """A prompt and its continuation."""

    prompt: str
    text: str  # including the prompt
    tokens: list[int]  # the new ones


def read_prompts(prompts: Sequence[str], file: str | None) -> tuple[str, ...]:
    """Return the prompts of the command line and of a file with one prompt per line, skipping empty lines.

    Raises:
        ConfigError: if there are none, or the file cannot be read.
    """
    found = list(prompts)
    if file is not None:
        try:
            text = Path(file).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"--prompt-file {shown(file)} cannot be read: {error}; expected text with one prompt per line"
            ) from error
        found += [line for line in text.splitlines() if line.strip()]
    if not found:
        raise ConfigError('generate needs a prompt: --prompt "Once upon a time", or --prompt-file FILE with one per line')
    return tuple(found)


def named_tokenizer(name: str) -> TextTokenizer:
    """Return the tokenizer of `--tokenizer`: bytes, or a name or folder that transformers knows.

    Raises:
        ConfigError: if it cannot be loaded.
    """
    from autofunc.data import load_tokenizer

    try:
        return load_tokenizer(None if name == BYTES else name)
    except DataError as error:
        raise ConfigError(f"--tokenizer: {error}") from error


def encoded(encode: Callable[[str], Sequence[int]], prompts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each prompt.

    Args:
        encode: a tokenizer's `encode`, as used for training texts, or `prompt`, which adds special tokens in front.
        prompts: not empty.

    Raises:
        ConfigError: for a prompt without tokens.
    """
    rows = [list(encode(prompt)) for prompt in prompts]
    for prompt, row in zip(prompts, rows, strict=True):
        if not row:
            raise ConfigError(f"--prompt {quoted(prompt)} has no tokens; give it at least one character")
    return rows


def put_together(
    tokenizer: TextTokenizer, prompts: Sequence[str], rows: Sequence[Sequence[int]], made: Sequence[Sequence[int]]
) -> list[MadeText]:
    """Decode tokens into texts."""
    return [
        MadeText(prompt, tokenizer.decode([*row, *new]), list(new))
        for prompt, row, new in zip(prompts, rows, made, strict=True)
    ]


def show(texts: Sequence[MadeText], *, as_json: bool) -> None:
    """Print texts to stdout, one after another; on a terminal control characters are escaped."""
    if as_json:
        sys.stdout.write(json.dumps([asdict(each) for each in texts], ensure_ascii=False) + "\n")
        return
    for each in texts:
        sys.stdout.write((printable(each.text, keep="\n\t") if sys.stdout.isatty() else each.text) + "\n")
