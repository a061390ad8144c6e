"""Wrong configurations: one clear error each, quickly, before the run begins."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from autofunc.train import begin
from tests.cli.here import Done, run_here
from tests.config.wrong import BY_OVERRIDES, BY_TEXT
from tests.config.wrong.base import BASE, ENVIRONMENT, with_sections, write_files

MOST_LINES, MOST_SECONDS = 15, 5.0  # of 80 columns; of this process's time


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with everything that the configurations name."""
    path = tmp_path_factory.mktemp("wrong")
    write_files(path)
    return path


def refused(folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> Done:
    """Run `autofunc finetune` on the folder's file."""

    def begun(*_: object) -> None:
        raise AssertionError("the run began")

    for name in ("launch", "run"):
        monkeypatch.setattr(begin, name, begun)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    return run_here(folder, "finetune", "llm", "-c", "cfg.yaml", *words)


def words_of(given: dict[str, str] | list[str] | str) -> list[str]:
    """Return the overrides in a row of the table."""
    return [given] if isinstance(given, str) else given if isinstance(given, list) else []


def shortcomings(done: Done, said: tuple[str, ...], seconds: float) -> list[str]:
    """Return what keeps an error from being clear."""
    lines = [part for line in done.err.splitlines() for part in textwrap.wrap(line, 80) or [""]]
    found = [f"does not say {text!r}" for text in said if text not in done.err]
    for is_so, problem in (
        (done.status != 2, f"status {done.status}"),
        (done.out != "", f"printed {done.out[:80]!r}"),
        (not done.err.startswith(("error: ", "Usage: ")), "does not begin as an error"),
        ("Traceback" in done.err, "a traceback"),
        (len(lines) > MOST_LINES, f"{len(lines)} lines of 80 columns"),
        (seconds > MOST_SECONDS, f"{seconds:.1f} s"),
    ):
        if is_so:
            found.append(problem)
    return found


def shortcomings_of_all(
    folder: Path, monkeypatch: pytest.MonkeyPatch, cases: Iterable[tuple[str, bytes, list[str], list[str]]]
) -> str:
    """Return each case's name, file, overrides, and what the error must contain."""
    bad = []
    for name, content, words, said in cases:
        (folder / "cfg.yaml").write_bytes(content)
        began = time.process_time()
        done = refused(folder, monkeypatch, *words)
        found = shortcomings(done, tuple(said), time.process_time() - began)
        if found:
            bad.append(f"{name}: {', '.join(found)}\n    {done.err[:400]}")
    return "\n".join(bad)


@pytest.mark.parametrize("kind", BY_OVERRIDES)
def test_one_clear_error(folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    cases = (
        (str(given)[:100], (with_sections(given) if isinstance(given, dict) else BASE).encode(), words_of(given), said)
        for given, *said in BY_OVERRIDES[kind]
    )
    bad = shortcomings_of_all(folder, monkeypatch, cases)
    assert not bad, bad


def test_one_clear_error_for_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = ((repr(text[-60:]), text if isinstance(text, bytes) else text.encode(), [], said) for text, *said in BY_TEXT)
    bad = shortcomings_of_all(folder, monkeypatch, cases)
    assert not (folder / "executed").exists()
    assert not bad, bad
