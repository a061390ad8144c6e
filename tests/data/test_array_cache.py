"""What was made once is read by others; what is damaged or of something else is made again."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autofunc.data import ColumnMappedTextInstructionDataset, HellaSwag, PackedText, TextFolder
from autofunc.data.array_cache import FOLDER, OFF, cache_folder, cached
from autofunc.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from autofunc.errors import DataError
from tests.data.test_datasets import SAMPLE
from tests.data.tokenizers import write_tokenizer

MAPPING = {"question": "q", "answer": "a"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_one_makes_and_all_read(cache: Path) -> None:
    made = []

    def make() -> dict[str, np.ndarray]:
        made.append(1)
        return {"ids": np.arange(5), "none": np.empty(0)}

    found: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: found.append(cached("x", {"of": 1}, make)["ids"])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and len(found) == 4 and all(each.tolist() == [0, 1, 2, 3, 4] for each in found)
    assert cached("x", {"of": 2}, make) and len(made) == 2, "another key"
    assert isinstance(found[0], np.memmap), "and nothing is copied"


def damage(folder: Path, how: str) -> None:
    if how == "flipped":
        content = bytearray((folder / "ids.npy").read_bytes())
        content[-1] ^= 1
        (folder / "ids.npy").write_bytes(content)
    elif how == "cut":
        (folder / "ids.npy").write_bytes((folder / "ids.npy").read_bytes()[:-3])
    elif how == "lost":
        (folder / "ids.npy").unlink()
    elif how == "no manifest":
        (folder / "manifest.json").write_text("{")
    else:
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, "key": "of another"}))


def test_damaged_ones_are_made_again(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for how in ("flipped", "cut", "lost", "no manifest", "of another"):
        cached("x", {}, lambda: {"ids": np.arange(5)})
        (folder,) = (each for each in cache.iterdir() if each.is_dir())
        damage(folder, how)
        assert cached("x", {}, lambda: {"ids": np.arange(6)})["ids"].tolist() == [0, 1, 2, 3, 4, 5], how
        assert "rebuilding it" in capsys.readouterr().err, how
        assert cached("x", {}, list).keys() == {"ids"}, "it is whole again"  # type: ignore[arg-type]
        assert not capsys.readouterr().err
        cached("x", {}, lambda: {"ids": np.arange(5)})
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def test_a_dataset_is_tokenised_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until its file, or an option that matters, is another."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"q": "why", "a": "so"}))
    calls = []
    plain = ByteTokenizer.spans

    def counted(self: ByteTokenizer, text: str, special: bool) -> object:
        calls.append(text)
        return plain(self, text, special)

    monkeypatch.setattr(ByteTokenizer, "spans", counted)
    read = lambda **given: ColumnMappedTextInstructionDataset(str(path), MAPPING, **given)[0]["labels"].tolist()  # noqa: E731
    assert read() == read() == read(seq_length=8) and len(calls) == 1
    assert read(answer_only_loss_mask=False) != read() and len(calls) == 2
    path.write_text(json.dumps({"q": "why", "a": "no"}))
    assert read() and len(calls) == 3
    monkeypatch.setenv(FOLDER, OFF)
    assert read() and len(calls) == 4


def test_what_is_read_is_what_was_made(cache: Path, tmp_path: Path) -> None:
    """Of every dataset that tokenises; the second one does not."""
    name = write_tokenizer(tmp_path / "tokenizer")
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": "what is it? " * count}) for count in range(1, 20)))
    makes: list[Callable[[], Any]] = [
        lambda: TextFolder(str(texts), seq_len=8, tokenizer=name),
        lambda: HellaSwag(str(SAMPLE), tokenizer=name, num_samples_limit=5),
        lambda: PackedText(str(texts), 16, tokenizer=name),
    ]
    for number, make in enumerate(makes, 1):
        made = [make()[index] for index in range(3)]
        assert len([each for each in cache.iterdir() if each.is_dir()]) == (number if number < 3 else 4)
        with pytest.MonkeyPatch.context() as patch:
            for method in ("encode", "spans"):
                patch.delattr(HuggingFaceTokenizer, method)
            read = [make()[index] for index in range(3)]
        assert all(torch.equal(a[key], b[key]) for a, b in zip(made, read, strict=True) for key in a)


def test_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "autofunc" / "data"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(FOLDER, str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot be written: .*; set AUTOFUNC_CACHE"):
        cached("x", {}, dict)
    with pytest.raises(OSError, match="of the data"):
        monkeypatch.setenv(FOLDER, str(tmp_path / "other"))
        cached("x", {}, fails)


def fails() -> dict[str, np.ndarray]:
    raise OSError("of the data")
