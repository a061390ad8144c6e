"""`autofunc data`: prepare text for training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autofunc.cli.loading import loading_torch
from autofunc.errors import DataError
from autofunc.shown import shown

app = typer.Typer(no_args_is_help=True, help="Prepare text for training.")


@app.callback()
def _group() -> None:
    """Commands for data."""


@app.command("tokenize", epilog="Example: autofunc data tokenize corpus.jsonl --tokenizer gpt2 -o tokens/train.bin")
def tokenize(
    texts: Annotated[list[str], typer.Argument(help="Text files, .jsonl, .json, .csv or .parquet files, or folders.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Token file to write, such as tokens/train.bin.")],
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Name or folder for transformers; bytes by default.")
    ] = None,
    text_column: Annotated[str, typer.Option("--text-column", help="Column of files with rows.")] = "text",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Write the tokens of texts to a file that autofunc.data.TokenFiles reads.

    Each document ends with the tokenizer's end-of-text token.
    """
    if output.suffix != ".bin":
        raise DataError(f"--output {shown(output)}: expected a name ending in .bin")
    if output.exists() and not overwrite:
        raise DataError(f"--output {shown(output)} already exists; choose another name, or pass --overwrite to replace it")
    with loading_torch():
        from autofunc.data.documents import Documents
        from autofunc.data.token_file import write_token_file
        from autofunc.data.tokenizer import load_tokenizer
    documents, made_by = Documents(texts, text_column), load_tokenizer(tokenizer)
    count = write_token_file(output, documents.tokens(made_by), made_by.vocab_size)
    typer.echo(f"{shown(output)}: {count:,} tokens of {documents} ({shown(made_by.name)}, {made_by.vocab_size:,} ids)")
