"""config.json files that are wrong or hostile, and weights as torch.save writes them."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.hostile.judge import Case
from tests.hostile.schedules import sparse
from tests.hostile.weights import CONFIG, PLAIN, SINGLE, folder_of, link_to, special, values

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1,
    "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1, "tie_word_embeddings": False,
}  # fmt: skip


def config(name: str, content: object, *says: str) -> Case:
    """A config.json beside weights that are right."""

    def fill(folder: Path) -> None:
        save_file(values(), folder / SINGLE)
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / CONFIG).write_bytes(text)

    return folder_of(f"config {name}", fill, *says)


def plain(name: str, *says: str, **changes: Any) -> Case:
    return config(name, PLAIN | changes, *says)


def llama(name: str, *says: str, **changes: Any) -> Case:
    return config(name, LLAMA | changes, *says)


ADAPTER, BASES = "adapter_config.json", ("../outside", "/etc", "org/model", "a" * 90)


def adapter(base: str) -> Callable[[Path], Any]:
    """Writes what PEFT says of an adapter for a model elsewhere."""
    return lambda path: path.write_text(json.dumps({"base_model_name_or_path": base, "peft_type": "LORA"}))


CONFIGS = [
    config("empty", b"", CONFIG, "JSON"),
    config("cut", b'{"architectures": [', CONFIG, "JSON"),
    config("list", [1], CONFIG, "object"),
    config("null", None, CONFIG, "object"),
    config("deep", b"[" * 10**5, CONFIG, "nested"),
    config("digits", b'{"size": ' + b"1" * 5000 + b"}", CONFIG, "JSON"),
    config("wide", '{"size": 1}'.encode("utf-16"), CONFIG, "UTF-8"),
    config("twice", b'{"size": 1, "size": 2}', CONFIG, "'size'", "twice"),
    config("nobody", {}, "architectures"),
    plain("architectures of numbers", "architectures", architectures=[7]),
    plain("architectures that are a mapping", "architectures", architectures={"a": 1}),
    plain("architectures that are a number", "architectures", architectures=7),
    plain("architectures that nobody knows", "architecture", architectures=["\x1b[31m[/x]<script>"]),
    plain("architectures that are long", "architecture", architectures=["X" * 10**6]),
    config("model_type list", {"model_type": ["llama"]}, "model_type"),
    config("model_type path", {"model_type": "../../etc"}, "model_type"),
    plain("dtype number", "dtype", dtype=32),
    plain("dtype list", "dtype", dtype=["float32"]),
    plain("dtype int", "dtype", dtype="int8"),
    plain("unknown key", "sise", sise=4),
    plain("long key", "config", **{"x" * 10**6: 4}),
    plain("text for a number", "size", size="4"),
    plain("null for a number", "PlainForCausalLM", size=None),
    plain("negative", "PlainForCausalLM", size=-4),
    plain("too large for an index", "PlainForCausalLM", size=10**30),
    plain("larger than the weights", "parameters", size=10**9),
    plain("many layers", "parameters", num_layers=10**12),
    llama("many layers of a known model", "parameters", num_hidden_layers=10**12),
    llama("heads that do not divide", "LlamaConfig", num_attention_heads=3, num_key_value_heads=3),
    llama("text for a number of a known model", "Llama", hidden_size="8"),
    llama("no heads", "Llama", num_attention_heads=0),
    llama("code beside it", "trust_remote_code", architectures=["Odd"], auto_map={"AutoModel": "odd.Odd"}),
    llama("a list as code", "auto_map", architectures=["Odd"], auto_map=["odd.Odd"]),
    llama("numbers as code", "auto_map", architectures=["Odd"], auto_map={"AutoModel": 7}),
    llama("quantized", "quantization_config", quantization_config={"quant_method": "fp8"}),
    llama("another class", "LlamaForCausalLM", architectures=["LlamaForCausalLM", 7]),
    *(special(f"an adapter of {base}", adapter(base), ADAPTER, repr(base), "Merge", at=ADAPTER) for base in BASES),
    special("an adapter that is no JSON", lambda path: path.write_text("{"), ADAPTER, "JSON", at=ADAPTER),
    special("an adapter that is a fifo", os.mkfifo, ADAPTER, "is not a file", at=ADAPTER),
    special("a fifo", os.mkfifo, CONFIG, "is not a file", at=CONFIG),
    special("a link to a fifo", link_to(os.mkfifo), CONFIG, "is not a file", at=CONFIG),
    special("a dangling link", lambda path: path.symlink_to("gone"), CONFIG, "link", at=CONFIG),
    special("a folder", Path.mkdir, CONFIG, "is not a file", at=CONFIG),
    special("a hole", sparse, CONFIG, "bytes", at=CONFIG),
]  # fmt: skip


class Payload:
    """Pickled, it makes a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self._mark = str(folder / "executed")

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self._mark,)


def saved(name: str, write: Callable[[Path], Any], *says: str, file: str = "pytorch_model.bin") -> Case:
    """What torch.save wrote, or should have."""

    def fill(folder: Path) -> None:
        write(folder / file)

    return folder_of(f"torch.save {name}", fill, *says, config=LLAMA)


def state(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def write(path: Path) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        tensors: dict[str, Any] = LlamaForCausalLM(LlamaConfig(**LLAMA)).state_dict()
        change(tensors)
        torch.save(tensors, path)

    return write


def _index(path: Path, shard: object) -> None:
    torch.save({}, path.parent.parent / "outside.bin")
    path.write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": shard}}))


def _bomb(path: Path) -> None:
    """A zip file of 64 KB whose one record claims 64 MB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(64 * 2**20))


def _zipped(path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a/data.pkl", pickle.dumps(Payload(path.parent)))
        file.writestr("a/version", "3")
    path.write_bytes(buffer.getvalue())


BIN, NORM = "pytorch_model.bin", "model.norm.weight"
PICKLES = [
    saved("code in it", lambda path: path.write_bytes(pickle.dumps(Payload(path.parent))), BIN),
    saved("code in a zip file", _zipped, BIN),
    saved("code beside tensors", lambda path: torch.save({"a": Payload(path.parent)}, path), BIN),
    saved("a whole module", lambda path: torch.save(torch.nn.Linear(2, 2), path), BIN),
    saved("nothing", lambda path: path.write_bytes(b""), BIN),
    saved("text", lambda path: path.write_text("no"), BIN),
    saved("a list", lambda path: torch.save([torch.ones(1)], path), BIN),
    saved("numbers", state(lambda v: v.update({NORM: 7})), NORM),
    saved("ints", state(lambda v: v.update({NORM: v[NORM].long()})), NORM, "int64"),
    saved("bools", state(lambda v: v.update({NORM: v[NORM].bool()})), NORM, "bool"),
    saved("complex", state(lambda v: v.update({NORM: v[NORM].to(torch.complex64)})), NORM, "complex64"),
    saved("fp8", state(lambda v: v.update({NORM: v[NORM].to(torch.float8_e4m3fn)})), NORM, "float8"),
    saved("a bomb", _bomb, BIN),
    saved("cut", lambda path: (torch.save(values(), path), path.write_bytes(path.read_bytes()[:500])), BIN),
    saved("a fifo", os.mkfifo, BIN, "is not a file"),
    saved("a dangling link", lambda path: path.symlink_to("gone"), BIN, "link"),
    saved("an index upwards", lambda path: _index(path, "../outside.bin"), "../outside.bin", file=BIN + ".index.json"),
    saved("an index to etc", lambda path: _index(path, "/etc/passwd"), "/etc/passwd", file=BIN + ".index.json"),
    saved("an index of numbers", lambda path: _index(path, 7), "lm_head.weight", file=BIN + ".index.json"),
    saved("an index that is no JSON", lambda path: path.write_text("{"), "JSON", file=BIN + ".index.json"),
]
