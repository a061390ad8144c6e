"""Datasets that are broken or hostile."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.hostile.judge import Case
from tests.hostile.schedules import sparse

GOOD = {"ctx": "A man sits down", "endings": ["and sings.", "and flies."], "label": 0}


class Given(NamedTuple):
    """What a dataset is made with."""

    kind: str  # of dataset
    path: Path
    options: dict[str, Any]


def dataset(kind: str, name: str, make: Callable[[Path], Any], *says: str, called: str = "", **options: Any) -> Case:
    def write(folder: Path) -> Given:
        make(folder / name)
        return Given(kind, folder / name, options)

    return Case(f"{kind} {called or name}", write, says)


def table(name: str, content: bytes | str, *says: str) -> Case:
    """A file of HellaSwag."""
    text = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    return dataset("HellaSwag", name, lambda path: path.write_bytes(text), name, *says)


def lines(name: str, second: object, *says: str) -> Case:
    """A file whose second line is wrong."""
    text = second if isinstance(second, str) else json.dumps(second)
    return table(f"{name}.jsonl", f"{json.dumps(GOOD)}\n{text}\n{json.dumps(GOOD)}\n", "line 2", *says)


def row(name: str, *says: str, **changes: Any) -> Case:
    return lines(name, GOOD | changes, *says)


def sheet(name: str, second: str, *says: str) -> Case:
    good = 'He,"[""sits."", ""sings.""]",0\n'
    return table(f"{name}.csv", f"ctx,endings,label\n{good}{second}\n", "line 3", *says)


def folder(name: str, make: Callable[[Path], Any], *says: str, kind: str = "TextFolder", **options: Any) -> Case:
    """A folder with a file that is right, and what is not."""

    def fill(path: Path) -> None:
        path.mkdir()
        (path / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
        make(path)

    return dataset(kind, "corpus", fill, *says, called=name, **options)


def _socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path may have 107 characters
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def _outside(path: Path) -> None:
    (path.parent / "secret.txt").write_text("secret " * 100)
    (path / "b.txt").symlink_to(path.parent / "secret.txt")


def _card(pattern: str) -> Callable[[Path], None]:
    """A folder whose README says where its data are."""

    def fill(path: Path) -> None:
        (path.parent / "secret.jsonl").write_text(json.dumps(GOOD) + "\n")
        (path / "README.md").write_text(
            f"---\nconfigs:\n- config_name: default\n  data_files: {pattern.replace('OUTSIDE', str(path.parent))}\n---\n"
        )

    return fill


def _parquet(rows: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        import pyarrow
        from pyarrow import parquet

        columns = {"ctx": ["A man"] * rows, "endings": [["sits."]] * rows, "label": ["0"] * (rows - 1) + ["5"]}
        parquet.write_table(pyarrow.table(columns), path)

    return write


BOMB = gzip.compress(bytes(50 * 2**20))

ROWS = [
    lines("cut", '{"ctx": "A man', "JSON"),
    lines("text", "A man sits down", "JSON"),
    lines("list", ["a", "b"], "list"),
    lines("number", 7, "int"),
    lines("null", "null", "NoneType"),
    lines("deep", "[" * 10**5, "nested"),
    lines("digits", '{"label": ' + "1" * 5000 + "}", "JSON"),
    lines("two", json.dumps(GOOD) * 2, "JSON"),
    lines("double", '{"ctx": "a", "ctx": "b"}', "'ctx'", "twice"),
    lines("lacking", {"ctx": "A man", "endings": ["a"]}, "label"),
    lines("surrogate", json.dumps(GOOD | {"ctx": "\ud800"}), "ctx"),
    row("label_far", "label 2", "2 endings", label=2),
    row("label_negative", "label -1", label=-1),
    row("label_empty", "label ''", label=""),
    row("label_text", "label 'one'", label="one"),
    row("label_power", "label '²'", label="²"),
    row("label_huge", "label", label="9" * 10**5),
    row("label_fraction", "label 0.5", label=0.5),
    row("label_true", "label True", label=True),
    row("label_null", "label None", label=None),
    row("label_list", "label [0]", label=[0]),
    row("ctx_number", "ctx", label=0, ctx=7),
    row("ctx_null", "ctx", label=0, ctx=None),
    row("endings_none", "endings", endings=[]),
    row("endings_numbers", "endings", endings=[1, 2]),
    row("endings_null", "endings", endings=None),
    row("endings_mapping", "endings", endings={"a": 1}),
    row("endings_code", "endings", endings="__import__('os').mkdir('executed')"),
    row("endings_deep", "endings", endings="(" * 10**5),
    row("endings_minus", "endings", endings="-" * 10**5 + "1"),
    row("endings_escape", r"\x1b[31m", endings="\x1b[31m[/x]"),
    table("latin.jsonl", json.dumps(GOOD).encode() + b'\n{"ctx": "\xe4"}\n', "line 2", "UTF-8"),
    table("binary.jsonl", bytes(range(255, 0, -1)) * 10, "line 1", "UTF-8"),
    table("wide.jsonl", json.dumps(GOOD).encode("utf-16"), "UTF-8"),
    table("empty.jsonl", "", "empty"),
    table("blank.jsonl", "\n\n", "empty"),
    table("columns.jsonl", '{"text": "a"}\n', "line 1", "no column 'ctx'"),
    table("document.json", json.dumps([GOOD, 7]), "row 2", "int"),
    table("label.json", json.dumps([GOOD, GOOD | {"label": 9}]), "row 2", "label 9"),
    table("cut.json", json.dumps([GOOD])[:-1], "JSON"),
    table("number.json", "7", "int"),
    table("web.json", "<html></html>", "JSON"),
    sheet("short", "He", "endings"),
    sheet("long", 'He,"[""a""]",0,5', "4 fields"),
    sheet("endings", "He,sits,0", "endings 'sits'"),
    sheet("label", 'He,"[""a""]",1', "label '1'"),
    sheet("open_quote", 'He,"[""a""', "not valid CSV"),
    sheet("wide_field", f'He,"{"a" * 200_000}",0', "field"),
    table("no_header.csv", 'He,"[""a""]",0\n', "line 1", "no column 'ctx'"),
    table("empty.csv", "", "line 1", "no column 'ctx'"),
    table("twice.csv", 'ctx,ctx,endings,label\na,b,"[""a""]",0\n', "'ctx'", "twice"),
    table("no.parquet", b"PAR1 no", "no.parquet"),
    table("empty.parquet", b""),
    dataset("HellaSwag", "label.parquet", _parquet(3), "label.parquet", "row 3", "label '5'"),
    table("table.txt", "x", "is .txt"),
    table("bomb.jsonl", BOMB, "gzip", "is compressed"),
    table("bomb.csv", BOMB, "gzip", "is compressed"),
    table("bomb.json", lzma.compress(bytes(10**6)), "is compressed"),
    table("zip.jsonl", b"PK\x03\x04" + bytes(100), "is compressed"),
    dataset("HellaSwag", "none.jsonl", lambda path: None, "there is no file or folder"),
    dataset("HellaSwag", "fifo.jsonl", os.mkfifo, "fifo.jsonl", "is not a file"),
    dataset("HellaSwag", "socket.jsonl", _socket, "socket.jsonl", "is not a file"),
    dataset("HellaSwag", "dangling.jsonl", lambda path: path.symlink_to("gone"), "dangling.jsonl", "link"),
    dataset("HellaSwag", "device.jsonl", lambda path: path.symlink_to("/dev/zero"), "device.jsonl", "is not a file"),
    dataset("HellaSwag", "hole.jsonl", sparse, "hole.jsonl", "bytes"),
    dataset("HellaSwag", "folder", Path.mkdir, "folder"),
    folder("of a bomb", lambda path: (path / "train.jsonl").write_bytes(BOMB), "is compressed", kind="HellaSwag"),
    folder("of a packed bomb", lambda path: (path / "train.jsonl.gz").write_bytes(BOMB), "is compressed", kind="HellaSwag"),
    folder("of bad lines", lambda path: (path / "train.jsonl").write_text("{"), "line 1", kind="HellaSwag"),
    folder("of a fifo", lambda path: os.mkfifo(path / "train.jsonl"), "is not a file", kind="HellaSwag"),
    folder("of a dangling link", lambda path: (path / "train.jsonl").symlink_to("gone"), "link", kind="HellaSwag"),
    folder("whose card leads upwards", _card("../secret.jsonl"), "outside", kind="HellaSwag"),
    folder("whose card leads elsewhere", _card("OUTSIDE/secret.jsonl"), "outside", kind="HellaSwag"),
]

TEXTS = [
    dataset("TextFolder", "none", lambda path: None, "neither a folder nor a file"),
    dataset("TextFolder", "fifo.txt", os.mkfifo, "fifo.txt", "is not a file"),
    dataset("TextFolder", "socket.txt", _socket, "socket.txt", "is not a file"),
    dataset("TextFolder", "device.txt", lambda path: path.symlink_to("/dev/zero"), "device.txt", "is not a file"),
    dataset("TextFolder", "dangling.txt", lambda path: path.symlink_to("gone"), "dangling.txt", "link"),
    dataset("TextFolder", "circle.txt", lambda path: path.symlink_to(path.name), "circle.txt", "link"),
    dataset("TextFolder", "hole.txt", sparse, "hole.txt", "bytes"),
    dataset("TextFolder", "bomb.txt", lambda path: path.write_bytes(BOMB), "bomb.txt", "is compressed"),
    dataset("TextFolder", "b.txt.bz2", lambda path: path.write_bytes(bz2.compress(bytes(99))), "is compressed"),
    dataset("TextFolder", "empty.txt", Path.touch, "0 tokens"),
    dataset("TextFolder", "nulls.txt", lambda path: path.write_bytes(bytes(10**5)), "zero bytes"),
    dataset("TextFolder", "empty", Path.mkdir, "0 tokens"),
    dataset("TextFolder", "\x1b[31m[bold]\udcff", Path.mkdir, r"\x1b[31m[bold]\udcff", "0 tokens"),
    dataset("TextFolder", "x" * 300, lambda path: None, "neither a folder nor a file"),
    folder("with a fifo", lambda path: os.mkfifo(path / "b.txt"), "b.txt", "is not a file"),
    folder("with a socket", lambda path: _socket(path / "b.txt"), "b.txt", "is not a file"),
    folder("with a device", lambda path: (path / "b.txt").symlink_to("/dev/zero"), "b.txt", "is not a file"),
    folder("with a dangling link", lambda path: (path / "b.txt").symlink_to("gone"), "b.txt", "link"),
    folder("with a circle", lambda path: (path / "b.txt").symlink_to("b.txt"), "b.txt", "link"),
    folder("with a link outside", _outside, "b.txt", "outside"),
    folder("with a hole", lambda path: sparse(path / "b.txt"), "b.txt", "bytes"),
    folder("with a bomb", lambda path: (path / "b.txt").write_bytes(BOMB), "b.txt", "is compressed", suffixes=[".txt"]),
]  # fmt: skip

DATASETS = [*ROWS, *TEXTS]
