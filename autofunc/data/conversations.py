"""Conversations as tokens, by a tokenizer's chat template; the loss covers the answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from autofunc.data.learnt_tokens import Example, learnt_in
from autofunc.data.tokenizer import HuggingFaceTokenizer
from autofunc.errors import DataError, in_brief, one_of
from autofunc.shown import quoted

Message = Mapping[str, Any]

_ROLES = ("system", "user", "assistant", "tool", "developer")
_MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")


def messages_of(where: str, given: object) -> list[Message]:
    """Return the messages of a row, each with its content as one string.

    Raises:
        DataError: if the value is not a list of messages.
    """
    if not isinstance(given, list) or not given:
        raise DataError(f"{where}: messages are {quoted(given)}; expected a list of {{role: ..., content: ...}}")
    return [_message(where, each) for each in given]


def _message(where: str, given: object) -> Message:
    if not isinstance(given, Mapping):
        raise DataError(f"{where}: a message is {quoted(given)}; expected {{role: ..., content: ...}}")
    message = {str(name): value for name, value in given.items() if value is not None}  # tables fill absent keys with None
    if message.get("role") not in _ROLES:
        raise DataError(
            f"{where}: the role of a message is {quoted(given.get('role'))}; {one_of(given.get('role'), _ROLES)}"
        )
    content = message.get("content", "")
    if isinstance(content, list):
        content = " ".join(
            part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str)
        )
    if not isinstance(content, str):
        raise DataError(f"{where}: the content of a message is {quoted(content)}; expected a string")
    return {**message, "content": content}


def conversation(
    where: str, messages: Sequence[Message], tokenizer: HuggingFaceTokenizer, tools: Any, answers_only: bool
) -> Example:  # fmt: skip
    """Render a conversation with the chat template and tokenise it as a whole.

    An answer runs from the template's generation prompt to the end of its message. If the template marks answers itself,
    its marks decide.

    Args:
        where: the conversation's place in its file, for error messages.
        messages: of the conversation.
        tokenizer: has a chat template.
        tools: for the template to describe.
        answers_only: True trains on the answers only, False on everything.

    Raises:
        DataError: if the template cannot render the conversation, or answers cannot be told from the rest.
    """
    try:
        if answers_only and _MARKS_ANSWERS.search(tokenizer.chat_template or ""):
            return Example(*tokenizer.marked(messages, tools))
        whole = tokenizer.render(messages, tools)
        parts = _answers(where, whole, messages, tokenizer, tools) if answers_only else [(0, len(whole))]
    except DataError:
        raise
    except Exception as error:  # templates raise what they like
        raise DataError(f"{where}: the chat template of {quoted(tokenizer.name)} fails: {in_brief(error)}") from error
    spans = tokenizer.spans(whole, special=False)
    return Example(spans.ids, learnt_in(spans, parts))


def _answers(
    where: str, whole: str, messages: Sequence[Message], tokenizer: HuggingFaceTokenizer, tools: Any
) -> list[tuple[int, int]]:  # fmt: skip
    """Return the (begin, end) of each answer in the text of a conversation."""
    found = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before = tokenizer.render(messages[:number], tools, asks=True) if number else ""
            after = tokenizer.render(messages[: number + 1], tools)
            if not (after.startswith(before) and whole.startswith(after)):
                raise DataError(
                    f"{where}: the chat template of {quoted(tokenizer.name)} renders message {number + 1} differently "
                    "within the conversation than at its end, so its tokens cannot be identified; give a chat_template "
                    "that marks answers with {% generation %}, or rows with one answer"
                )
            found.append((len(before), len(after)))
    return found
