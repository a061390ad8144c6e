"""Instructions from a table: columns with a context, a question and its answer; the loss covers the answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from autofunc.data.checks import check_at_least_one
from autofunc.data.conversations import conversation
from autofunc.data.instruction_rows import InstructionRows, PaddingMode
from autofunc.data.learnt_tokens import Example, examples_of, learnt_in
from autofunc.data.tables import Tables, text_of
from autofunc.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, load_tokenizer
from autofunc.errors import DataError, one_of
from autofunc.shown import quoted

_PARTS = ("context", "question", "answer")
_VERSION = 1  # of the tokenisation; part of the cache key


class ColumnMappedTextInstructionDataset(InstructionRows):
    """Rows of a table of instructions.

    A row is {"input_ids", "labels"}, int64 of shape (seq_length,); labels are -100 outside the loss. With a chat template
    the context is the system message, the question the user's and the answer the assistant's. Without one they are joined
    by spaces, followed by the tokenizer's end-of-text token, which the loss covers too.

    Args:
        path_or_dataset_id: a file (.jsonl, .json, .csv, .parquet), several, a folder of such files, or a hub name.
        column_mapping: names of the columns for `answer`, and `question` or `context` or both.
        tokenizer: a name or folder for `transformers`; None takes bytes.
        split: of a folder or a hub dataset.
        name: the subset of a hub dataset.
        answer_only_loss_mask: False trains on all tokens.
        seq_length: tokens per row; None takes the longest example, rounded up to a multiple of 8.
        padding: `do_not_pad` gives rows of different lengths, for `dataloader.pad_seq_len_divisible` or `pad_seq_len_to`.
        truncation: True cuts the end off longer examples; rows left with nothing to train on are dropped and counted.
        limit_dataset_samples: take only the first rows.
        use_hf_chat_template: whether to use the tokenizer's chat template; None uses it if there is one.
        aligned_labels: False gives `labels[t] = input_ids[t]`, for models that shift labels themselves.

    Raises:
        DataError: if columns are missing, rows cannot be read or rendered, or none has anything to train on.
    """

    def __init__(
        self,
        path_or_dataset_id: str | list[str],
        column_mapping: dict[str, str],
        tokenizer: str | None = None,
        split: str = "train",
        name: str | None = None,
        answer_only_loss_mask: bool = True,
        seq_length: int | None = None,
        padding: PaddingMode = "max_length",
        truncation: bool = True,
        limit_dataset_samples: int | None = None,
        use_hf_chat_template: bool | None = None,
        aligned_labels: bool = True,
    ) -> None:
        cls = "ColumnMappedTextInstructionDataset"
        check_at_least_one(cls, limit_dataset_samples=limit_dataset_samples)
        try:
            _check_mapping(column_mapping)
            tables = Tables(path_or_dataset_id, split, name, limit=limit_dataset_samples)
            made_by = load_tokenizer(tokenizer)
            template = getattr(made_by, "chat_template", None)
            if use_hf_chat_template and template is None:
                raise DataError(f"use_hf_chat_template: tokenizer {quoted(made_by.name)} has no chat template")
            renders = template is not None and use_hf_chat_template is not False

            def make() -> Iterator[Example]:
                for where, row in tables.rows(list(column_mapping.values())):
                    parts = {part: text_of(where, column, row[column]) for part, column in column_mapping.items()}
                    if renders:
                        assert isinstance(made_by, HuggingFaceTokenizer)
                        yield conversation(where, _messages(parts), made_by, None, answer_only_loss_mask)
                    else:
                        yield _joined(parts, made_by, answer_only_loss_mask)

            key = {
                "made by": f"columns {_VERSION}", **tables.key(), "columns": dict(column_mapping),
                "answers": answer_only_loss_mask, "renders": renders,
            }  # fmt: skip
            examples = examples_of("instructions", str(tables), key, made_by, make)
        except DataError as error:
            raise DataError(f"{cls}: {error}") from error
        super().__init__(
            examples, made_by, str(tables), seq_length=seq_length, padding=padding, truncation=truncation,
            aligned_labels=aligned_labels,
        )  # fmt: skip


def _check_mapping(mapping: Mapping[str, str]) -> None:
    for part in mapping:
        if part not in _PARTS:
            raise DataError(f"column_mapping has {quoted(part)}; {one_of(part, _PARTS)}")
    if "answer" not in mapping or len(mapping) < 2:
        raise DataError(
            f"column_mapping has {', '.join(mapping) or 'nothing'}; expected answer, and question or context, or both"
        )


def _messages(parts: Mapping[str, str]) -> list[dict[str, Any]]:
    asked = "question" if "question" in parts else "context"
    system = [{"role": "system", "content": parts["context"]}] if asked == "question" and parts.get("context") else []
    return [*system, {"role": "user", "content": parts[asked]}, {"role": "assistant", "content": parts["answer"]}]


def _joined(parts: Mapping[str, str], tokenizer: ByteTokenizer | HuggingFaceTokenizer, answers_only: bool) -> Example:
    prompt = "".join(f"{parts[part]} " for part in _PARTS[:2] if parts.get(part))
    text = prompt + parts["answer"]
    spans = tokenizer.spans(text, special=True)
    learnt = learnt_in(spans, [(len(prompt) if answers_only else 0, len(text))])
    end = tokenizer.end_of_text
    if end is None:
        return Example(spans.ids, learnt)
    ids = list(spans.ids)
    if ids and ids[-1] == end and not learnt[-1]:  # added by the tokenizer itself
        return Example(ids, [*learnt[:-1], True])
    return Example([*ids, end], [*learnt, True])
