"""What is made from another source is current: pictures, the notebook, the tables of keys."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def making(name: str) -> ModuleType:
    """A script of docs/making."""
    spec = importlib.util.spec_from_file_location(f"making_{name}", ROOT / "docs" / "making" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures_are_current() -> None:
    pictures = making("pictures")
    assert {path.stem for path in pictures.FOLDER.iterdir()} == set(pictures.PICTURES)
    for name, draw in pictures.PICTURES.items():
        assert (pictures.FOLDER / f"{name}.svg").read_text() == draw(), f"{name}: run python docs/making/pictures.py"


def test_every_picture_is_shown() -> None:
    pages = "".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
    assert [path.name for path in (ROOT / "docs" / "pictures").iterdir() if f"pictures/{path.name})" not in pages] == []


def test_pictures_are_drawn_on_white() -> None:
    """The site's style sheet inverts them on dark pages."""
    style = "stylesheets/pictures.css"
    assert f"extra_css: [{style}]\n" in (ROOT / "mkdocs.yml").read_text() and (ROOT / "docs" / style).is_file()
    for path in (ROOT / "docs" / "pictures").iterdir():
        ground = path.read_text().partition("</style>\n")[2]
        assert ground.startswith("<rect width=") and ground.partition("/>")[0].endswith('fill="white"'), path


def test_the_tables_of_keys_are_current() -> None:
    keys = making("keys")
    assert keys.current(keys.PAGE.read_text()) == keys.PAGE.read_text(), "run python docs/making/keys.py"


def test_a_key_in_no_table_is_an_error() -> None:
    keys = making("keys")
    with pytest.raises(ValueError, match=r"in no table.*'seed'"):
        keys.current(keys.PAGE.read_text().replace("<!-- keys: seed ", "<!-- keys: "))


def test_a_stale_default_is_mended_and_meanings_stay() -> None:
    keys = making("keys")
    page = keys.PAGE.read_text()
    stale = page.replace("| `distributed.schedule` | text | `1f1b` |", "| `distributed.schedule` | number | `gpipe` |")
    assert stale != page and keys.current(stale) == page


def test_the_notebook_is_current() -> None:
    notebook = making("notebook")
    assert notebook.NOTEBOOK.read_text() == notebook.made(notebook.PAGE.read_text()), "run python docs/making/notebook.py"


@pytest.mark.full
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tutorial as a reader runs it; the test of its page does the same where notebooks cannot be run."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    shutil.copy(ROOT / "examples" / "tutorial.ipynb", tmp_path)
    places = [str(Path(sys.executable).parent), os.environ["PATH"]]
    monkeypatch.setenv("PATH", os.pathsep.join(places))  # where `autofunc` and `torchrun` are
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(tmp_path / "tutorial.ipynb", as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    printed = json.dumps(notebook)
    assert "rank 0 | 0 1 ....[0 ]2" in printed and "failed" in printed
    assert (tmp_path / "runs" / "long" / "metrics.jsonl").exists()
