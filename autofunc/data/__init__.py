"""Datasets and loaders: rows of token ids with labels that are already aligned (`labels[t]` follows `input_ids[t]`)."""

from autofunc.data.chat import ChatDataset
from autofunc.data.column_mapped import ColumnMappedTextInstructionDataset
from autofunc.data.hellaswag import HellaSwag
from autofunc.data.instruction_rows import InstructionRows
from autofunc.data.loader import STACKED, START, Part, Position, first_rows, make_loader, num_batches
from autofunc.data.made_up import MadeUpTokens
from autofunc.data.mock import MockDataset
from autofunc.data.packed_text import PackedText
from autofunc.data.padding import Padded, Padding
from autofunc.data.rows import text_columns
from autofunc.data.text_folder import TextFolder
from autofunc.data.token_file import read_token_file, write_token_file
from autofunc.data.token_files import TokenFiles
from autofunc.data.tokenizer import ByteTokenizer, TextTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "STACKED",
    "START",
    "ByteTokenizer",
    "ChatDataset",
    "ColumnMappedTextInstructionDataset",
    "HellaSwag",
    "InstructionRows",
    "MadeUpTokens",
    "MockDataset",
    "PackedText",
    "Padded",
    "Padding",
    "Part",
    "Position",
    "TextFolder",
    "TextTokenizer",
    "TokenFiles",
    "Tokenizer",
    "first_rows",
    "load_tokenizer",
    "make_loader",
    "num_batches",
    "read_token_file",
    "text_columns",
    "write_token_file",
]
