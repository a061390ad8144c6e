"""`autofunc schedule`: figures, pictures and tables on the command line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from autofunc import schedule
from autofunc.cli.main import app
from autofunc.errors import ScheduleError


def run(*words: str) -> str:
    result = CliRunner().invoke(app, ["schedule", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_list_names_all_in_80_columns() -> None:
    lines = run("list").splitlines()
    assert [line.split()[0] for line in lines] == schedule.names()
    assert max(map(len, lines)) <= 80 and all(len(line.split()) > 3 for line in lines)


def test_show_is_text_that_can_be_read_again(tmp_path: Path) -> None:
    table = run("show", "zb_h1", "-p", "3", "-m", "4")
    built = schedule.build("zb_h1", num_ranks=3, num_microbatches=4)
    assert schedule.from_text(table, "zb_h1") == built
    lowered = run("show", "zb_h1", "-p", "3", "-m", "4", "--lowered")
    assert schedule.from_text(lowered, "zb_h1") == schedule.lower(built)
    (tmp_path / "mine.txt").write_text(lowered)
    assert schedule.draw(built) in run("simulate", str(tmp_path / "mine.txt"))


def test_simulate_draws_and_counts() -> None:
    out = run("simulate", "1f1b", "-p", "2", "-m", "3", "-I", "1", "--comm", "0")
    assert "rank 1 | ..0 [0 ]1 [1 ]2 [2 ]....\n" in out
    assert re.search(r"1f1b +│ +2 │ +12 │ +25.0% │ +25.0% │ +2 │", out)


def test_compare_all_by_default() -> None:
    out = run("compare", "-p", "8", "-m", "32")
    assert re.search(r"interleaved_1f1b +│ +16 │ +106.5 │ +9.9%", out) and re.search(r"zb_h2 .* 0.0% │ +15 │", out)
    three = run("compare", "1f1b", "looped_bfs", "-v", "3")
    assert re.search(r"looped_bfs +│ +12 │", three) and "gpipe" not in three


def test_a_file_that_breaks_a_law_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_text("0F0 0B0 0F1 0B1 \n 1F0 1F1 1B0 1B1")
    with pytest.raises(ScheduleError, match=">>0B0<<"):
        run("simulate", str(tmp_path / "bad.txt"))
    with pytest.raises(ScheduleError, match=r"there is no file .*bax.txt'; did you mean .*bad.txt"):
        run("simulate", str(tmp_path / "bax.txt"))


def test_needs_no_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from autofunc.cli.main import app;"
        "CliRunner().invoke(app, ['schedule', 'compare'], catch_exceptions=False); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
