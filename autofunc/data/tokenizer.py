"""From text to token ids: a Hugging Face tokenizer, or plain bytes when none is named."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Protocol

from autofunc.errors import DataError, in_brief
from autofunc.hub_access import cache_without_network
from autofunc.shown import quoted


class Tokenizer(Protocol):
    """What datasets need of a tokenizer."""

    name: str
    vocab_size: int

    def encode(self, text: str) -> Sequence[int]:
        """Token ids of a text, without special tokens."""
        ...


class TextTokenizer(Tokenizer, Protocol):
    """What generating needs of one."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some token ids, without special tokens."""
        ...


class ByteTokenizer:
    """UTF-8 bytes: 256 ids, nothing to download."""

    name = "bytes"
    vocab_size = 256

    def encode(self, text: str) -> Sequence[int]:
        """The UTF-8 bytes of the text; lone surrogates, as from `surrogateescape`, give their bytes back."""
        return text.encode("utf-8", errors="surrogateescape")

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of these bytes; what is none is shown as U+FFFD."""
        return b"".join(bytes((each,)) if each < 256 else b"\xff" for each in tokens).decode("utf-8", errors="replace")


class _HuggingFaceTokenizer:
    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer  # takes seconds to import

        network = ""
        try:
            with nullcontext("") if Path(name).exists() else cache_without_network() as network:
                self._tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except Exception as error:  # whatever is in its files
            raise DataError(
                f"tokenizer {quoted(name)} cannot be loaded{network}: {in_brief(error)}. "
                "Name a folder with a tokenizer, a hub name that is in the local cache or can be "
                "downloaded, or leave it out to use bytes."
            ) from error
        self.name = name
        self.vocab_size = len(self._tokenizer)

    def encode(self, text: str) -> Sequence[int]:
        ids: Sequence[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text


def load_tokenizer(name: str | None) -> TextTokenizer:
    """The tokenizer of a name or folder that `transformers` knows; bytes when `name` is None.

    Raises:
        DataError: when it cannot be loaded.
    """
    return ByteTokenizer() if name is None else _HuggingFaceTokenizer(name)
