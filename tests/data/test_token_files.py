"""Token files: what is written is read, in rows; what is none, or damaged, is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from autofunc.data import TokenFiles, make_loader, read_token_file, write_token_file
from autofunc.data.token_file import HEADER_BYTES
from autofunc.errors import DataError
from tests.cli.here import run_here
from tests.data.tokenizers import write_tokenizer


def write(path: Path, count: int, vocab_size: int = 300) -> Path:
    write_token_file(path, [np.arange(count // 2), np.arange(count // 2, count)], vocab_size)
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    for vocab_size, size in ((1 << 16, 2), (1 << 16 | 1, 4)):
        path = write(tmp_path / "new" / "a.bin", 50, vocab_size)
        assert path.stat().st_size == HEADER_BYTES + 50 * size
        header = np.fromfile(path, "<i4", 256)
        assert header[:5].tolist() == [278895051, 1, 50, size, vocab_size] and not header[5:].any()
        tokens, known = read_token_file(path)
        assert tokens.tolist() == list(range(50)) and known == vocab_size and isinstance(tokens, np.memmap)
    header[:4] = 20240520, 1, 3, 0
    (tmp_path / "older.bin").write_bytes(header.tobytes() + np.array([7, 8, 9], "<u2").tobytes())
    assert read_token_file(tmp_path / "older.bin")[0].tolist() == [7, 8, 9]
    (tmp_path / "raw.bin").write_bytes(np.arange(9, dtype="<u2").tobytes())
    row = TokenFiles(str(tmp_path / "raw.bin"), 4, raw_dtype="uint16")[1]
    assert row["input_ids"].tolist() == [4, 5, 6, 7] and row["labels"].tolist() == [5, 6, 7, 8]


def test_rows_of_files(tmp_path: Path) -> None:
    """No token is in two rows; each file's end is left out."""
    write(tmp_path / "b.bin", 23), write(tmp_path / "a.bin", 13)
    data = TokenFiles(str(tmp_path / "*.bin"), 5)
    rows = [data[index]["input_ids"].tolist() for index in range(len(data))]
    assert rows == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], *([n, n + 1, n + 2, n + 3, n + 4] for n in (0, 5, 10, 15))]
    assert data.vocab_size == 300 and data[5]["labels"].tolist() == [16, 17, 18, 19, 20]
    assert (
        len(TokenFiles([str(tmp_path / "b.bin")], 22))
        == len(TokenFiles(str(tmp_path / "b.bin"), 5, num_samples_limit=1))
        == 1
    )
    seen = lambda seed: [part.batch["input_ids"][:, 0].tolist() for part in make_loader(data, 2, microbatch=2, seed=seed, shuffle=True)]  # noqa: E731, E501  # fmt: skip
    assert seen(1) == seen(1) != seen(2) and torch.equal(data[0]["input_ids"], data[0]["input_ids"])


def test_rows_that_begin_with_a_document(tmp_path: Path) -> None:
    write_token_file(tmp_path / "a.bin", [np.array([5, 1, 6, 7, 1, 8, 8, 8, 8, 1, 9, 9, 9, 1, 2])], 10)
    data = TokenFiles(str(tmp_path / "a.bin"), 4, bos_token=1, align_to_bos=True)
    assert [data[index]["input_ids"].tolist() for index in range(len(data))] == [[1, 6, 7, 1], [1, 9, 9, 9]]


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut": (lambda content: content[:-1], "is damaged: .* 20 tokens of 2 bytes, and 39 bytes follow it; expected 40"),
    "longer": (lambda content: content + b"x", "is damaged"),
    "header": (lambda content: content[:100], "has 100 bytes; a token file begins with a header"),
    "text": (lambda content: b"{" * 2000, "is not a token file: it begins with .*raw_dtype"),
    "version": (lambda content: content[:4] + b"\2" + content[5:], "says version 2"),
    "size": (lambda content: content[:12] + b"\3" + content[13:], "20 tokens of 3 bytes"),
    "none": (lambda content: content[:8] + b"\0" + content[9:], "0 tokens"),
}  # fmt: skip


def test_damaged_files_are_named(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.bin", 20).read_bytes()
    for name, (damage, message) in DAMAGE.items():
        (tmp_path / f"{name}.bin").write_bytes(damage(whole))
        with pytest.raises(DataError, match=rf"TokenFiles: .*{name}\.bin.*{message}"):
            TokenFiles(str(tmp_path / f"{name}.bin"), 4)
    (tmp_path / "other.bin").write_bytes(whole[:-2] + b"\xff\xff")
    data = TokenFiles(str(tmp_path / "other.bin"), 4)
    with pytest.raises(DataError, match=r"other\.bin is damaged: token 65535 at 19, expected ids below 300"):
        TokenFiles(str(tmp_path / "other.bin"), 19)[0]
    assert data[0]["labels"].tolist() == [1, 2, 3, 4]
    for given, options, message in (
        ("whole.bin", {"seq_len": 20}, "has no row of seq_len=20 and a token after it"),
        ("whole.bin", {"align_to_bos": True}, "align_to_bos needs bos_token"),
        ("whole.bin", {"align_to_bos": True, "bos_token": 99}, "no row .* that begins with bos_token=99"),
        ("no*.bin?", {}, "no file matches"),
        ("nowhere.bin", {}, r"nowhere\.bin does not exist"),
    ):
        with pytest.raises(DataError, match=f"TokenFiles: .*{message}"):
            TokenFiles(str(tmp_path / given), **{"seq_len": 4, **options})  # type: ignore[arg-type]
    for tokens in ([300], [-1]):
        with pytest.raises(DataError, match="is not below vocab_size=300"):
            write_token_file(tmp_path / "high.bin", [np.array(tokens)], 300)
    assert not [each for each in tmp_path.iterdir() if each.name.startswith("high")], "nothing of it is left"


def test_the_command(tmp_path: Path) -> None:
    """Documents end with the tokenizer's token for that; a run reads what was written."""
    name = write_tokenizer(tmp_path / "tokenizer")
    texts = ["what is it?", "the answer is four", "é"] * 9
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"content": text}) for text in texts))
    words = "data", "tokenize", "a.jsonl", "--text-column", "content", "--tokenizer", name, "-o", "out/a.bin"
    done = run_here(tmp_path, *words)
    assert done.status == 0 and "out/a.bin: " in done.out and "tokens of a.jsonl" in done.out, done.err
    from transformers import AutoTokenizer

    tokens = read_token_file(tmp_path / "out" / "a.bin")[0]
    assert AutoTokenizer.from_pretrained(name).decode(tokens.tolist()) == "".join(f"{text}<eos>" for text in texts)
    done = run_here(tmp_path, *words)
    assert done.status == 2 and "already exists" in done.err
    done = run_here(tmp_path, *words, "--overwrite", "--text-column", "text")
    assert done.status == 2 and "line 1 of a.jsonl has no column 'text'" in done.err
    assert read_token_file(tmp_path / "out" / "a.bin")[0].tolist() == tokens.tolist(), "the file that was there is whole"
    model = "{_target_: stages.gpt2.build_gpt2_model, vocab_size: 100, n_positions: 8, n_embd: 8, n_layer: 1, n_head: 1}"
    (tmp_path / "run.yaml").write_text(f"""
        model: {model}
        dataset: {{_target_: autofunc.data.TokenFiles, file_pattern: "out/*.bin", seq_len: 8}}
        step_scheduler: {{global_batch_size: 2, max_steps: 1}}
        distributed: {{engine: eager}}
        optimizer: {{_target_: torch.optim.SGD, lr: 1e-2}}
    """)
    done = run_here(tmp_path, "train", "-c", "run.yaml")
    assert done.status == 2 and "dataset has token ids up to" in done.err and "vocab_size=100" in done.err
    done = run_here(tmp_path, "train", "-c", "run.yaml", "--model.vocab_size", "330")
    assert done.status == 0, done.err
