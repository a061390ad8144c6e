"""From text to token ids: a Hugging Face tokenizer, or plain bytes if none is named."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from autofunc.errors import DataError, in_brief
from autofunc.hub_access import cache_without_network
from autofunc.shown import quoted


class Spans(NamedTuple):
    """Tokens of a text and the characters each covers, `begin` to `end - 1`; special tokens cover none."""

    ids: Sequence[int]
    begins: Sequence[int]
    ends: Sequence[int]


class Tokenizer(Protocol):
    """What datasets need from a tokenizer."""

    name: str
    vocab_size: int
    end_of_text: int | None  # the token that ends a text

    @property
    def identity(self) -> str | None:
        """A text that is equal for tokenizers that produce equal ids; None if that cannot be known."""
        ...

    def encode(self, text: str) -> Sequence[int]:
        """Return the token ids of a text, without special tokens."""
        ...

    def spans(self, text: str, special: bool) -> Spans:
        """Return the tokens of a text and where they are in it, with or without the special tokens around it."""
        ...


class TextTokenizer(Tokenizer, Protocol):
    """What generation needs from a tokenizer."""

    def prompt(self, text: str) -> Sequence[int]:
        """Return the token ids of a text to continue, after the special tokens the tokenizer begins texts with."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        ...


class ByteTokenizer:
    """UTF-8 bytes: 256 ids, nothing to download."""

    name = "bytes"
    vocab_size = 256
    identity = "bytes"
    end_of_text: int | None = None

    def encode(self, text: str) -> Sequence[int]:
        """Return the UTF-8 bytes of a text; lone surrogates, as from `surrogateescape`, become their original bytes."""
        return text.encode("utf-8", errors="surrogateescape")

    def prompt(self, text: str) -> Sequence[int]:
        """The same as `encode`: no byte is special."""
        return self.encode(text)

    def spans(self, text: str, special: bool) -> Spans:
        """See `Tokenizer.spans`: each byte stands for its character."""
        lengths = [len(self.encode(character)) for character in text]
        at = [index for index, length in enumerate(lengths) for _ in range(length)]
        return Spans(list(self.encode(text)), at, [index + 1 for index in at])

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of these bytes; invalid ones become U+FFFD."""
        return b"".join(bytes((each,)) if each < 256 else b"\xff" for each in tokens).decode("utf-8", errors="replace")


class HuggingFaceTokenizer:
    """A tokenizer of `transformers`.

    Args:
        name: a hub name or a folder.
        chat_template: replaces the tokenizer's own.

    Raises:
        DataError: if it cannot be loaded.
    """

    def __init__(self, name: str, chat_template: str | None = None) -> None:
        from transformers import AutoTokenizer  # takes seconds to import

        network = ""
        try:
            with nullcontext("") if Path(name).exists() else cache_without_network() as network:
                self._tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except Exception as error:  # its files may hold anything
            first = in_brief(error).partition("\n")[0].rstrip(".")
            raise DataError(
                f"tokenizer {quoted(name)} cannot be loaded{network}: {first}. "
                "Name a folder with a tokenizer, a hub name that is in the local cache or can be "
                "downloaded, or leave it out to use bytes."
            ) from error
        if chat_template is not None:
            self._tokenizer.chat_template = chat_template
        self.name = name
        self.vocab_size = len(self._tokenizer)
        self.end_of_text: int | None = self._tokenizer.eos_token_id

    @property
    def identity(self) -> str | None:
        """See `Tokenizer.identity`: a digest of its whole content; None unless the library `tokenizers` backs it."""
        if not self._tokenizer.is_fast:
            return None
        versions = [version(library) for library in ("tokenizers", "transformers")]
        content = f"{self._tokenizer.backend_tokenizer.to_str()} {self.end_of_text} {self.chat_template} {versions}"
        return hashlib.blake2b(content.encode(errors="surrogatepass"), digest_size=16).hexdigest()

    @property
    def chat_template(self) -> str | None:
        """The Jinja template that renders conversations; None if it has none."""
        template = self._tokenizer.chat_template
        return template.get("default") if isinstance(template, dict) else template

    def encode(self, text: str) -> Sequence[int]:
        """See `Tokenizer.encode`."""
        ids: Sequence[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def prompt(self, text: str) -> Sequence[int]:
        """See `TextTokenizer.prompt`. Drops a final end-of-text token: nothing could follow it."""
        ids: list[int] = self._tokenizer(text, verbose=False)["input_ids"]
        return ids[:-1] if ids and ids[-1] == self._tokenizer.eos_token_id else ids

    def spans(self, text: str, special: bool) -> Spans:
        """See `Tokenizer.spans`.

        Raises:
            DataError: if it does not report which characters a token covers.
        """
        if not self._tokenizer.is_fast:
            raise DataError(
                f"tokenizer {quoted(self.name)} ({type(self._tokenizer).__name__}) does not report where its tokens are in "
                "a text; expected one with a tokenizer.json"
            )
        made = self._tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        offsets = made["offset_mapping"]
        return Spans(made["input_ids"], [begin for begin, _ in offsets], [end for _, end in offsets])

    def render(self, messages: Sequence[Any], tools: Any = None, *, asks: bool = False) -> str:
        """Render a conversation as text with the chat template.

        Args:
            messages: each with `role` and `content`.
            tools: for the template to describe.
            asks: whether to append the beginning of an answer (the generation prompt).
        """
        text: str = self._tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=False, add_generation_prompt=asks
        )
        return text

    def marked(self, messages: Sequence[Any], tools: Any = None) -> tuple[list[int], list[bool]]:
        """Return a conversation's tokens, and which of them the chat template marks as answers (`{% generation %}`)."""
        made = self._tokenizer.apply_chat_template(
            list(messages), tools=tools, return_dict=True, return_assistant_tokens_mask=True
        )
        return made["input_ids"], [bool(each) for each in made["assistant_masks"]]

    def decode(self, tokens: Sequence[int]) -> str:
        """See `TextTokenizer.decode`."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the files that transformers loads it from, including the chat template it was given."""
        self._tokenizer.save_pretrained(str(folder))


def load_tokenizer(name: str | None) -> ByteTokenizer | HuggingFaceTokenizer:
    """Load the tokenizer of a hub name or folder with `transformers`; None gives bytes.

    Raises:
        DataError: if it cannot be loaded.
    """
    return ByteTokenizer() if name is None else HuggingFaceTokenizer(name)
