"""A wheel holds all of the two packages, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from email import message_from_bytes
from pathlib import Path
from zipfile import ZipFile

import pytest

import autofunc

ROOT = Path(__file__).parent.parent
PACKAGES = ("autofunc", "stages")


def files_of(folder: Path) -> set[str]:
    paths = (path for package in PACKAGES for path in (folder / package).rglob("*"))
    return {path.relative_to(folder).as_posix() for path in paths if path.is_file() and "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
    """Built from a copy, because setuptools leaves files beside its sources."""
    folder = tmp_path_factory.mktemp("sources")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    build = "from setuptools.build_meta import build_wheel; build_wheel('built')"
    subprocess.run([sys.executable, "-c", build], cwd=folder, check=True, capture_output=True)
    (built,) = (folder / "built").glob("*.whl")
    return ZipFile(built)


@pytest.mark.full
def test_wheel_holds_all_files(wheel: ZipFile) -> None:
    wanted = files_of(ROOT)
    assert {"autofunc/py.typed", "autofunc/train/run.html", "stages/gpt2.py"} <= wanted
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == wanted


@pytest.mark.full
def test_wheel_says_what_it_is(wheel: ZipFile) -> None:
    (folder,) = {name.split("/")[0] for name in wheel.namelist()} - set(PACKAGES)
    facts = message_from_bytes(wheel.read(f"{folder}/METADATA"))
    assert facts["Version"] == autofunc.__version__
    assert "Typing :: Typed" in facts.get_all("Classifier", [])
    assert "autofunc = autofunc.cli.main:main" in wheel.read(f"{folder}/entry_points.txt").decode()
    assert f"{folder}/licenses/LICENSE" in wheel.namelist()
