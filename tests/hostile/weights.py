"""Folders of weights that are wrong or hostile."""

from __future__ import annotations

import gzip
import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.hostile.judge import Case
from tests.hostile.schedules import sparse

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
PLAIN = {"architectures": ["PlainForCausalLM"]}


@dataclass
class PlainConfig:
    size: int = 4
    num_layers: int = 1


class PlainForCausalLM(nn.Module):
    """A matrix and two buffers."""

    def __init__(self, config: PlainConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(nn.Linear(config.size, config.size, bias=False) for _ in range(config.num_layers))
        self.register_buffer("scale", torch.ones(config.size))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) * self.get_buffer("scale")
        return x


def values() -> dict[str, Tensor]:
    return {"layers.0.weight": torch.ones(4, 4), "scale": torch.ones(4), "count": torch.zeros((), dtype=torch.int64)}


def raw(header: object, data: int = 0, length: int | None = None) -> bytes:
    """A safetensors file by hand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


def entry(dtype: object = "F32", shape: object = (4, 4), offsets: object = (0, 64)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def folder_of(name: str, fill: Callable[[Path], Any], *says: str, config: Any = None) -> Case:
    """A folder with a config.json that is right, and what is not."""

    def write(folder: Path) -> Path:
        (folder / CONFIG).write_text(json.dumps(config or PLAIN))
        fill(folder)
        return folder

    return Case(name, write, says)


def single(name: str, content: bytes, *says: str) -> Case:
    return folder_of(f"single {name}", lambda folder: (folder / SINGLE).write_bytes(content), *says)


def stored(dtype: str, item_bytes: float, said: str) -> Case:
    """The matrix in a dtype that no float parameter is read from."""
    header = {
        ONE: entry(dtype, offsets=(0, int(16 * item_bytes))),
        "scale": entry("F32", (4,), (int(16 * item_bytes), int(16 * item_bytes) + 16)),
    }
    return single(f"{dtype} weights", raw(header, int(16 * item_bytes) + 16), ONE, said)


def with_values(name: str, change: Callable[[dict[str, Tensor]], Any], *says: str) -> Case:
    def fill(folder: Path) -> None:
        tensors = values()
        change(tensors)
        save_file(tensors, folder / SINGLE)

    return folder_of(f"single {name}", fill, *says)


def special(name: str, make: Callable[[Path], Any], *says: str, at: str = SINGLE) -> Case:
    def fill(folder: Path) -> None:
        (folder / at).unlink(missing_ok=True)
        make(folder / at)

    return folder_of(f"{name} as {at}", fill, *says)


def link_to(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Makes a link to what is made beside it, as a cache of the hub has links to blobs."""

    def link(path: Path) -> None:
        make(path.parent / f"blob-{path.name}")
        path.symlink_to(f"blob-{path.name}")

    return link


HTML = b"<!doctype html><html><body>404 \x1b[31m</body></html>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 64\n"
NOT = "model.safetensors is not a safetensors file"
ONE = "layers.0.weight"

FILES = [
    single("empty", b"", NOT),
    single("one byte", b"\0", NOT),
    single("seven bytes", bytes(7), NOT),
    single("no header", bytes(8), NOT),
    single("header longer than the file", raw({}, length=100), NOT),
    single("header of 2**63", raw({}, length=2**63), NOT),
    single("header of 2**64-1", raw({}, length=2**64 - 1), NOT),
    single("header of 99 MB", raw({}, length=99_000_000), NOT),
    single("header that is no JSON", raw(b"{weights}"), NOT),
    single("header that is no text", raw(b"\xff\xfe\x00\x01"), NOT),
    single("header that is cut", raw(b'{"a": {"dtype"'), NOT),
    single("header that is a list", raw([1]), NOT),
    single("header that is a number", raw(7), NOT),
    single("header that is null", raw(None), NOT),
    single("header that is deep", raw(b'{"a":' + b"[" * 10**5), NOT),
    single("entry that is a list", raw({ONE: [1]}), NOT),
    single("entry that is null", raw({ONE: None}), NOT),
    single("no dtype", raw({ONE: {"shape": [1], "data_offsets": [0, 4]}}, 4), NOT),
    single("no shape", raw({ONE: {"dtype": "F32", "data_offsets": [0, 4]}}, 4), NOT),
    single("no offsets", raw({ONE: {"dtype": "F32", "shape": [1]}}, 4), NOT),
    single("unknown dtype", raw({ONE: entry("F128")}, 64), NOT),
    single("dtype in lower case", raw({ONE: entry("f32")}, 64), NOT),
    single("dtype that is a number", raw({ONE: entry(32)}, 64), NOT),
    single("dtype with escape codes", raw({ONE: entry("\x1b[31m")}, 64), NOT),
    single("negative shape", raw({ONE: entry(shape=(-4, -4))}, 64), NOT),
    single("shape of fractions", raw({ONE: entry(shape=(4.0, 4.0))}, 64), NOT),
    single("shape of texts", raw({ONE: entry(shape=("4", "4"))}, 64), NOT),
    single("shape that overflows", raw({ONE: entry(shape=(2**62, 2**62))}, 64), NOT),
    single("shape of more than there is", raw({ONE: entry(shape=(4, 10**9))}, 64), NOT),
    single("offsets reversed", raw({ONE: entry(offsets=(64, 0))}, 64), NOT),
    single("offsets beyond the end", raw({ONE: entry(shape=(10**6,), offsets=(0, 4 * 10**6))}, 64), NOT),
    single("offsets negative", raw({ONE: entry(offsets=(-64, 0))}, 64), NOT),
    single("three offsets", raw({ONE: entry(offsets=(0, 32, 64))}, 64), NOT),
    single("offsets with a hole", raw({ONE: entry(offsets=(8, 72))}, 72), NOT),
    single("offsets that overlap", raw({ONE: entry(), "scale": entry("F32", (4,), (0, 16))}, 64), NOT),
    single("bytes after the end", raw({ONE: entry()}, 128), NOT),
    single("bytes missing", raw({ONE: entry()}, 32), NOT),
    single("metadata of numbers", raw({"__metadata__": {"a": 1}, ONE: entry()}, 64), NOT),
    single("metadata that is a list", raw({"__metadata__": [1], ONE: entry()}, 64), NOT),
    single("a web page", HTML, NOT),
    single("a pointer of git-lfs", LFS, NOT),
    single("a zip file", b"PK\x03\x04" + bytes(100), NOT),
    single("gzip", gzip.compress(bytes(10**5)), NOT),
    single("a pickle", b"\x80\x02cos\nsystem\nq\x00X\x04\x00\x00\x00trueq\x01\x85q\x02Rq\x03.", NOT),
    single("a long name", raw({"x" * 10**6: entry()}, 64), "no place for"),
    single("a name with escape codes", raw({"\x1b[31m[/x]": entry()}, 64), r"\x1b[31m[/x]"),
    single("a name of several lines", raw({"a\nerror: b\u202e": entry()}, 64), r"a\nerror: b\u202e"),
    single("many names", raw({f"x{i}": entry("F32", (0,), (0, 0)) for i in range(20_000)}), "no place for"),
    with_values("another shape", lambda v: v.update({ONE: torch.ones(4, 5)}), ONE, "(4, 5)"),
    with_values("no matrix", lambda v: v.pop(ONE), ONE),
    with_values("one more", lambda v: v.update(odd=torch.ones(1)), "odd"),
    with_values("a float for a count", lambda v: v.update(count=torch.ones(())), "count", "int64"),
    with_values("an int for a scale", lambda v: v.update(scale=torch.ones(4, dtype=torch.int64)), "scale", "int64"),
    stored("I64", 8, "int64"),
    stored("I32", 4, "int32"),
    stored("I8", 1, "int8"),
    stored("U8", 1, "uint8"),
    stored("U16", 2, "uint16"),
    stored("BOOL", 1, "bool"),
    stored("C64", 8, "complex64"),
    stored("F8_E4M3", 1, "float8_e4m3fn"),
    stored("F8_E5M2", 1, "float8_e5m2"),
    stored("F8_E8M0", 1, "float8_e8m0fnu"),
    stored("F4", 0.5, "F4"),
    special("a fifo", os.mkfifo, SINGLE, "is not a file"),
    special("a folder", Path.mkdir, SINGLE, "is not a file"),
    special("a dangling link", lambda path: path.symlink_to("gone"), SINGLE, "link"),
    special("a link to itself", lambda path: path.symlink_to(path.name), SINGLE, "link"),
    special("a device", lambda path: path.symlink_to("/dev/zero"), SINGLE, "is not a file"),
    special("a link to a fifo", link_to(os.mkfifo), SINGLE, "is not a file"),
    special("a link to a folder", link_to(Path.mkdir), SINGLE, "is not a file"),
    special("a link to a link to a fifo", link_to(link_to(os.mkfifo)), SINGLE, "is not a file"),
    special("a hole", sparse, SINGLE, NOT),
]


def indexed(name: str, index: object, *says: str) -> Case:
    """An index, beside a shard that is right."""

    def fill(folder: Path) -> None:
        save_file(values(), folder / "a.safetensors")
        save_file(values(), folder.parent / "outside.safetensors")
        content = index if isinstance(index, bytes) else json.dumps(index).encode()
        (folder / INDEX).write_bytes(content.replace(b"OUTSIDE", str(folder.parent / "outside.safetensors").encode()))

    return folder_of(f"index {name}", fill, INDEX, *says)


def shard(name: object, *says: str) -> Case:
    """An index that names a shard."""
    index = {"weight_map": {ONE: "a.safetensors", "scale": name, "count": "a.safetensors"}}
    return indexed(f"naming {name!r:.40}", index, "scale", *says)


def shard_that_is(name: str, make: Callable[[Path], Any], *says: str) -> Case:
    def fill(folder: Path) -> None:
        save_file(values(), folder / "a.safetensors")
        make(folder / "b.safetensors")
        index = {"weight_map": {ONE: "a.safetensors", "scale": "b.safetensors", "count": "a.safetensors"}}
        (folder / INDEX).write_text(json.dumps(index))

    return folder_of(f"shard that is {name}", fill, "b.safetensors", *says)


INDICES = [
    shard("../outside.safetensors", "../outside.safetensors"),
    shard("OUTSIDE", "outside.safetensors"),
    shard("/etc/passwd", "/etc/passwd"),
    shard("../../../../../../etc/passwd"),
    shard("sub/../../outside.safetensors"),
    shard(".."),
    shard("."),
    shard(""),
    shard("~/a.safetensors"),
    shard("file:///etc/passwd"),
    shard("https://example.org/a.safetensors"),
    shard("..\\outside.safetensors"),
    shard("a.safetensors\0"),
    shard("a.bin"),
    shard(CONFIG),
    shard("gone.safetensors", "gone.safetensors", "not there"),
    shard("\x1b[31m[/x].safetensors", r"\x1b[31m[/x].safetensors"),
    shard("x" * 10**6 + ".safetensors"),
    shard("x" * 300 + ".safetensors"),
    shard(None),
    shard(7),
    shard(True),
    shard(["a.safetensors"]),
    shard({"a": "a.safetensors"}),
    indexed("that is a list", [1], "weight_map"),
    indexed("that is empty", b"", "JSON"),
    indexed("that is cut", b'{"weight_map": {', "JSON"),
    indexed("that is deep", b"[" * 10**5, "nested"),
    indexed("of digits", b'{"weight_map": ' + b"1" * 5000 + b"}", "JSON"),
    indexed("that is no text", b"\xff\xfe\xff", "UTF-8"),
    indexed("without a map", {"metadata": {}}, "weight_map"),
    indexed("with a list as map", {"weight_map": [ONE]}, "weight_map"),
    indexed("with null as map", {"weight_map": None}, "weight_map"),
    indexed("with an empty map", {"weight_map": {}}, "weight_map"),
    indexed("naming a tensor twice", b'{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}', "'a'", "twice"),
    indexed("naming a tensor that is not there", {"weight_map": {"odd": "a.safetensors"}}, "odd"),
    indexed("with many shards", {"weight_map": {f"x{i}": f"{i}.safetensors" for i in range(20_000)}}, "not there"),
    shard_that_is("a fifo", os.mkfifo, "is not a file"),
    shard_that_is("a dangling link", lambda path: path.symlink_to("gone"), "link"),
    shard_that_is("a device", lambda path: path.symlink_to("/dev/zero"), "is not a file"),
    shard_that_is("a link to a fifo", link_to(os.mkfifo), "is not a file"),
    shard_that_is("a folder", Path.mkdir, "is not a file"),
    shard_that_is("broken", lambda path: path.write_bytes(b"no"), "is not a safetensors file"),
    special("a fifo", os.mkfifo, INDEX, "is not a file", at=INDEX),
    special("a hole", sparse, INDEX, "bytes", at=INDEX),
    special("a dangling link", lambda path: path.symlink_to("gone"), INDEX, "link", at=INDEX),
]
