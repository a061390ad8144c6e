"""Long work shows progress, in the first process only."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from autofunc import progress_bar
from autofunc.progress_bar import LiveConsole, counting, note, say


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    now = [0.0]
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: now[0])
    yield now


def shown(
    monkeypatch: pytest.MonkeyPatch, clock: list[float], seconds: list[float], terminal: bool, rank: str = "0"
) -> str:
    out = io.StringIO()
    monkeypatch.setattr(progress_bar, "CONSOLE", Console(file=out, force_terminal=terminal, width=90))
    monkeypatch.setenv("RANK", rank)
    with counting("tokenising a.jsonl", "rows", total=50) as advance:
        for at in seconds:
            clock[0] += at
            advance(10)
    return out.getvalue()


def test_a_bar_or_lines_after_two_seconds(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    assert not shown(monkeypatch, clock, [0.5, 0.5, 0.9], False), "nothing of what is quick"
    lines = shown(monkeypatch, clock, [1, 2, 1, 11, 0.1], False).splitlines()
    assert lines == ["tokenising a.jsonl: 20 of 50 rows", "tokenising a.jsonl: 40 of 50 rows"]
    bar = shown(monkeypatch, clock, [1, 2], True)
    assert "tokenising a.jsonl" in bar and "20 of 50 rows" in bar
    assert "tokenising" not in shown(monkeypatch, clock, [1, 0.5], True)
    for terminal in (True, False):
        assert not shown(monkeypatch, clock, [9, 9, 9], terminal, rank="1"), "others are silent"


def test_only_the_first_process_prints_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        say(f"rank {rank} [bold] \x1b[31m")
        note(f"of rank {rank}")
    assert capsys.readouterr().err == "rank 0 [bold] \\x1b[31m\nnote: of rank 0\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_forced_colours_move_nothing_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for name, value in {"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"}.items():  # of a notebook, of some CI services
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            pipe, terminal = io.StringIO(), Terminal()
            for file in (pipe, terminal):
                with LiveConsole(file=file).status("working"):
                    pass
            assert Console(file=pipe).is_terminal and pipe.getvalue() == ""
            assert "working" in terminal.getvalue()
