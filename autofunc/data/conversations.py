"""Conversations as tokens, by a tokenizer's chat template; what is learnt are the answers."""

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
    """The messages of a row.

    Raises:
        DataError: for what are none.
    """
    if not isinstance(given, list) or not given:
        raise DataError(f"{where}: messages are {quoted(given)}; expected a list of {{role: ..., content: ...}}")
    return [_message(where, each) for each in given]


def _message(where: str, given: object) -> Message:
    if not isinstance(given, Mapping):
        raise DataError(f"{where}: a message is {quoted(given)}; expected {{role: ..., content: ...}}")
    message = {str(name): value for name, value in given.items() if value is not None}  # tables fill up with None
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
        raise DataError(f"{where}: the content of a message is {quoted(content)}; expected a text")
    return {**message, "content": content}


def conversation(
    where: str, messages: Sequence[Message], tokenizer: HuggingFaceTokenizer, tools: Any, answers_only: bool
) -> Example:  # fmt: skip
    """A conversation as the chat template renders it, with the tokens that it has as a whole.

    An answer is what follows where the template asks for one, up to the end of its message. A template that marks answers
    itself is believed.

    Args:
        where: it is, for messages.
        messages: of the conversation.
        tokenizer: has a chat template.
        tools: that the template may describe.
        answers_only: whether the answers are learnt, or all of it.

    Raises:
        DataError: where the template cannot render it, or not so that answers can be told from the rest.
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
    """Where the answers are in the text of a conversation."""
    found = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before = tokenizer.render(messages[:number], tools, asks=True) if number else ""
            after = tokenizer.render(messages[: number + 1], tools)
            if not (after.startswith(before) and whole.startswith(after)):
                raise DataError(
                    f"{where}: the chat template of {quoted(tokenizer.name)} renders message {number + 1} otherwise within "
                    "the conversation than at its end, so its tokens cannot be told; give a chat_template that marks "
                    "answers with {% generation %}, or rows with one answer"
                )
            found.append((len(before), len(after)))
    return found
