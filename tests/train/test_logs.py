"""Each process has a log; the console shows the first one's, or only the last line in a quiet run."""

from __future__ import annotations

import io
import logging
import os
import sys
from pathlib import Path

import pytest
from rich.console import Console

from autofunc.train.logs import Teed, kept_log, line_console, log_alone, log_of, show_last, write_log
from autofunc.train.progress import ProgressReporter
from tests.cli.here import run_here
from tests.train.test_weighing import finetune


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def text_of(folder: Path, rank: int = 0) -> str:
    return log_of(folder, rank).read_text()


def test_the_first_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console, errors = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", console)
    monkeypatch.setattr(sys, "stderr", errors)
    logger, handler = logging.getLogger("of a library"), logging.StreamHandler(errors)
    monkeypatch.setattr(logger, "handlers", [handler])
    with kept_log(tmp_path, 0):
        sys.stdout.write("\x1b[32mgreen\x1b[0m\n")
        logger.warning("logged")
        sys.stderr.write("warned\n")
        with log_alone():
            sys.stdout.write("shown before\n")
        write_log("a stack\n")
    assert sys.stdout is console and handler.stream is errors
    assert console.getvalue() == "\x1b[32mgreen\x1b[0m\n"
    assert errors.getvalue() == "logged\nwarned\n"
    first, *rest = text_of(tmp_path).splitlines()
    assert first.startswith("--- ") and f"rank 0, process {os.getpid()}" in first and "restart" not in first
    assert rest == ["green", "logged", "warned", "shown before", "a stack"]


def test_a_full_disk_does_not_end_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").mkdir()
    for rank in (0, 1):
        log_of(tmp_path, rank).symlink_to("/dev/full")
        with kept_log(tmp_path, rank):
            sys.stdout.write("said\n")
            write_log("noted\n")
        out = capfd.readouterr().out
        assert out.startswith("said\n" if rank == 0 else str(tmp_path)) and f"rank_{rank}.log lacks lines: " in out


def test_other_ranks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with kept_log(tmp_path, 1):
        sys.stdout.write("of Python\n")
        sys.stderr.write("an error\n")
        os.write(1, b"of a library in C\n")
    assert capfd.readouterr() == ("", ""), "the console has nothing of it"
    assert text_of(tmp_path, 1).splitlines()[1:] == ["of Python", "an error", "of a library in C"]


def test_the_final_traceback_and_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError), kept_log(tmp_path, 0):
        _ = 1 / 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    with kept_log(tmp_path, 0):
        sys.stdout.write("again\n")
    lines = text_of(tmp_path).splitlines()
    assert "Traceback (most recent call last):" in lines and "ZeroDivisionError: division by zero" in lines
    assert lines[-2].startswith("--- ") and lines[-2].endswith(", restart 2") and lines[-1] == "again"


def test_bars_are_not_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    with kept_log(tmp_path, 0):
        with ProgressReporter(line_console(), 5) as reporter:
            reporter.step(3, 2.5, "10 rows/s")
            reporter.validation(3, "validation loss: 2")
            sys.stdout.write("said by a model\n")
        assert isinstance(sys.stdout, Teed)
    assert sys.stdout is terminal
    assert "training" in terminal.getvalue() and "said by a model" in terminal.getvalue()
    assert text_of(tmp_path).splitlines()[1:] == ["step 3: validation loss: 2", "said by a model"]


def test_a_quiet_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with kept_log(tmp_path, 0, quiet=True):
        line_console().print("much")
        with ProgressReporter(line_console(), 5) as reporter:
            reporter.step(5, 2.5, "10 rows/s")
        show_last("the end")
    assert terminal.getvalue() == "the end\n"
    assert text_of(tmp_path).splitlines()[1:] == ["much", "step 5/5  loss 2.500  10 rows/s", "the end"]
    assert Console(file=terminal).is_terminal, "which would have shown a bar"


def test_lines_where_colours_are_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the output of a notebook's command."""
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stdout", pipe)
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = line_console()
    assert console.is_terminal
    with ProgressReporter(console, 5) as reporter:
        reporter.step(5, 2.5, "10 rows/s")
    assert pipe.getvalue() == "step 5/5  loss 2.500  10 rows/s\n"


def test_a_run(tmp_path: Path) -> None:
    *_, out = finetune(tmp_path)
    logged = text_of(tmp_path / "out").split("\n", 1)[1]
    assert out.endswith(logged) and "validation loss" in logged
    words = "finetune", "llm", "-c", "run.yaml"
    quiet = run_here(tmp_path, *words, "--overwrite", "--quiet")
    assert (quiet.status, quiet.err) == (0, "") and quiet.out == f"{out.splitlines()[-1]}\n"
    assert text_of(tmp_path / "out").count("--- ") == 1, "that of the run that was replaced is gone"
    assert "validation: " in text_of(tmp_path / "out") and (tmp_path / "out" / "run.html").is_file()

    (tmp_path / "parts.py").write_text(
        (tmp_path / "parts.py")
        .read_text()
        .replace("return nn.functional.cross_entropy(", "return torch.nan * nn.functional.cross_entropy(")
    )
    failed = run_here(tmp_path, *words, "--quiet", "--output_dir", "bad")
    assert failed.status == 1 and failed.out == "" and failed.err.endswith("log: bad/logs/rank_0.log\n"), failed.err
    assert "Traceback (most recent call last):" in text_of(tmp_path / "bad")
    assert "Traceback" not in failed.err
