"""Checkpoints that are damaged, unfinished or hostile: one error, and nothing is executed or read outside."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import autofunc as af
from autofunc.errors import CheckpointError
from tests.cases import assert_same_tree, make_case


class _Runs:
    """A pickle that makes a folder when it is read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._path),)


def _metadata(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        file = path / ".metadata"
        found = pickle.loads(file.read_bytes())
        file.write_bytes(pickle.dumps(change(found)))

    return apply


def _elsewhere(metadata: Any) -> Any:
    for part in metadata.storage_data.values():
        part.relative_path = "../" + part.relative_path
    return metadata


def _tensors(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        file = path / "__0_0.distcp"
        file.write_bytes(change(file.read_bytes()))

    return apply


def _written(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda path: (path / name).write_bytes(content) and None


def _manifest(**changes: Any) -> Callable[[Path], None]:
    return _written("autofunc.json", json.dumps({"format": 1, "extra": {}, **changes}).encode())


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no manifest": (lambda path: (path / "autofunc.json").unlink(), "not a complete checkpoint"),
    "no folder": (shutil.rmtree, "is not a folder"),
    "a file": (lambda path: shutil.rmtree(path) or (path.write_bytes(b"x") and None), "is not a folder"),
    "an empty manifest": (_written("autofunc.json", b""), "not a checkpoint's manifest"),
    "a list": (_written("autofunc.json", b"[1]"), "not a checkpoint's manifest"),
    "a deep list": (_written("autofunc.json", b"[" * 100_000), "not a checkpoint's manifest"),
    "no text": (_written("autofunc.json", b"\xff\xfe\x00"), "autofunc.json"),
    "another format": (_manifest(format=7), "format 7"),
    "extra is no mapping": (_manifest(extra=3), "not a checkpoint's manifest"),
    "no metadata": (lambda path: (path / ".metadata").unlink(), ".metadata does not exist"),
    "empty metadata": (_written(".metadata", b""), "cannot be read"),
    "half of the metadata": (
        lambda path: _written(".metadata", (path / ".metadata").read_bytes()[:500])(path), "cannot be read",
    ),
    "other metadata": (_metadata(lambda _: 3), "holds a int"),
    "metadata that runs": (_metadata(lambda _: _Runs(Path("made"))), "mkdir, which does not belong"),
    "metadata that leads elsewhere": (_metadata(_elsewhere), "is not in that folder"),
    "metadata is a FIFO": (
        lambda path: (path / ".metadata").unlink() or os.mkfifo(path / ".metadata"), "but a FIFO",
    ),
    "no tensors": (lambda path: (path / "__0_0.distcp").unlink(), "cannot be read"),
    "half of the tensors": (_tensors(lambda data: data[: len(data) // 2]), "cannot be read"),
    "other bytes": (_tensors(lambda data: b"\0" * len(data)), "cannot be read"),
}  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    _, stages, loss, _ = make_case("mlp", 2, 4)
    pipe = af.pipeline(stages, af.schedule.build("gpipe", num_ranks=2, num_microbatches=4), loss=loss)
    path = tmp_path_factory.mktemp("checkpoints") / "one"
    params = pipe.init(seed=1)
    af.save(path, params=params, extra={"a": [1, None, "x"]})
    return path, pipe, params


@pytest.mark.parametrize("damage", DAMAGES)
def test_one_error(written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.chdir(tmp_path)
    path, pipe, _ = written
    shutil.copytree(path, "c")
    change, said = DAMAGES[damage]
    change(Path("c"))
    with pytest.raises(CheckpointError) as error:
        af.load("c", pipe)
    text = str(error.value)
    assert said in text and text.startswith("c") and len(text) < 700, text
    assert not Path("made").exists(), "nothing is executed"


def test_what_was_saved_is_loaded(written: Any) -> None:
    path, pipe, params = written
    found = af.load(path, pipe)
    assert_same_tree(params, found.params)
    assert found.extra == {"a": [1, None, "x"]} and found.optimizer_state is None


def test_what_cannot_be_saved(written: Any, tmp_path: Path) -> None:
    path, _, params = written
    with pytest.raises(CheckpointError, match="already exists"):
        af.save(path, params=params)
    with pytest.raises(CheckpointError, match="not JSON serializable"):
        af.save(tmp_path / "c", params=params, extra={"a": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="Not a directory"):
        af.save(path / "autofunc.json" / "c", params=params)
    assert not list(tmp_path.iterdir())


def test_what_optimizers_keep_beside_parameters(written: Any, tmp_path: Path) -> None:
    """One that counts in its group: the count is as large as it was when it was saved."""

    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            group = self.param_groups[0]
            group["seen"] = group.get("seen", 0) + 1
            group["lr"] = 1.0 / group["seen"]
            super().step()

    _, pipe, params = written
    optimizer = af.optimizer(Counting, lr=1.0, momentum=0.5)
    params, state = params.clone(), optimizer.init(params)
    ones = params.clone().apply(torch.ones_like)
    for _ in range(3):
        params, state = optimizer.update(ones.clone(), state, params)
    af.save(tmp_path / "c", params=params, optimizer_state=state)
    found = af.load(tmp_path / "c", pipe, optimizer=optimizer)
    one, _ = optimizer.update(ones.clone(), state, params)
    other, _ = optimizer.update(ones.clone(), found.optimizer_state, found.params)
    assert_same_tree(one, other)
