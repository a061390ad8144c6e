"""Datasets and loaders: rows of token ids with labels that are already aligned (`labels[t]` follows `input_ids[t]`)."""

from autofunc.data.hellaswag import HellaSwag
from autofunc.data.loader import STACKED, START, Part, Position, first_rows, make_loader, num_batches
from autofunc.data.made_up import MadeUpTokens
from autofunc.data.rows import text_columns
from autofunc.data.text_folder import TextFolder
from autofunc.data.tokenizer import ByteTokenizer, TextTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "STACKED",
    "START",
    "ByteTokenizer",
    "HellaSwag",
    "MadeUpTokens",
    "Part",
    "Position",
    "TextFolder",
    "TextTokenizer",
    "Tokenizer",
    "first_rows",
    "load_tokenizer",
    "make_loader",
    "num_batches",
    "text_columns",
]
