"""`autofunc schedule`: figures, pictures and tables on the command line."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from autofunc import schedule
from autofunc.cli.main import app
from autofunc.cli.options import by_stage
from autofunc.errors import ScheduleError


def run(*words: str) -> str:
    result = CliRunner().invoke(app, ["schedule", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_list_names_all_in_80_columns() -> None:
    lines = run("list").splitlines()
    assert [line.split()[0] for line in lines] == schedule.names()
    assert max(map(len, lines)) <= 80 and all(len(line.split()) > 3 for line in lines)


def test_show_prints_text_that_can_be_read_again(tmp_path: Path) -> None:
    table = run("show", "zb_h1", "-p", "3", "-m", "4")
    built = schedule.build("zb_h1", num_ranks=3, num_microbatches=4)
    assert schedule.from_text(table, "zb_h1") == built
    lowered = run("show", "zb_h1", "-p", "3", "-m", "4", "--lowered")
    assert schedule.from_text(lowered, "zb_h1") == schedule.lower(built)
    (tmp_path / "mine.txt").write_text(lowered)
    merged = schedule.lower(built).compute_form()
    assert schedule.draw(merged) in run("simulate", str(tmp_path / "mine.txt"))


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


def test_show_writes_files(tmp_path: Path) -> None:
    for name in ("mine.csv", "mine.json"):
        assert f"wrote {tmp_path / name}" in run("show", "zbv", "--lowered", "-o", str(tmp_path / name))
        s = schedule.read_file(tmp_path / name)
        assert s.name == ("mine" if name == "mine.csv" else "zbv"), "a table has no name but the file's"
        assert replace(s, name="zbv") == schedule.lower(schedule.build("zbv", num_ranks=4, num_microbatches=8))
    assert "makespan" in run("compare", str(tmp_path / "mine.csv"), "1f1b")


def test_a_user_function(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def serial(num_ranks, num_microbatches):\n"
        "    return [[f'{r}{k}{m}' for m in range(num_microbatches) for k in 'FB'] for r in range(num_ranks)]\n"
    )
    assert re.search(r"serial +│ +2 │ +18 │", run("compare", f"{tmp_path / 'mine.py'}:serial", "-p", "2", "-m", "3"))


def test_compare_leaves_out_schedules_that_do_not_fit() -> None:
    out = run("compare", "-p", "4", "-m", "3")
    assert "left out dualpipe_v: schedule dualpipe_v: num_microbatches=3" in out and "zbv" in out
    with pytest.raises(ScheduleError, match="it needs at least 8"):
        run("compare", "dualpipe_v", "-p", "4", "-m", "3")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "-F", "abc"], "-F 'abc': expected a number"),
        (["compare", "--costs", "none.json"], "there is no file 'none.json'"),
        (["compare", "-F", "1,2", "-p", "3"], "no named schedule fits: left out gpipe: Costs.F has shape"),
        (["simulate", "1f1b", "--costs", "x.json", "-F", "2"], "-F 2 and --costs x.json were both given"),
        (["search", "-o", "found.xml"], "unknown suffix '.xml'"),
        (["search", "-o", "nowhere/found.csv"], "there is no such folder"),
        (["show", "1f1b", "-o", "nowhere/found.csv"], "cannot write nowhere/found.csv: No such file or directory"),
        (["simulate", "zbv.cvs"], "unknown schedule 'zbv.cvs'.*or a .csv, .txt or .json file"),
    ],
)
def test_mistakes(words: list[str], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        run(*words)


def test_a_lowered_file_is_checked_whole(tmp_path: Path) -> None:
    run("show", "1f1b", "-p", "2", "-m", "2", "--lowered", "-o", str(tmp_path / "low.csv"))
    run("simulate", str(tmp_path / "low.csv"))
    broken = (tmp_path / "low.csv").read_text().replace("0RECV_B0,", "")
    (tmp_path / "low.csv").write_text(broken)
    with pytest.raises(ScheduleError, match=r"low\.csv: rank 1, position \d, 1SEND_B0: its receive is missing"):
        run("simulate", str(tmp_path / "low.csv"))


def test_costs_mean_the_same_everywhere(tmp_path: Path) -> None:
    words = ("-p", "2", "-m", "4", "-F", "1,1,1,1")
    found = re.search(r"│ +4 │ +(\S+) │", run("search", *words, "--seconds", "0.3", "-o", str(tmp_path / "f.csv")))
    again = re.search(r"│ +4 │ +(\S+) │", run("simulate", str(tmp_path / "f.csv"), *words[4:]))
    assert found and again and found[1] == again[1]
    schedule.write_costs(tmp_path / "c.json", schedule.Costs(1, 1, 1))
    assert run("compare", "--costs", str(tmp_path / "c.json")) == run("compare")


def test_times_by_stage_are_redistributed_over_other_numbers_of_stages() -> None:
    out = run("compare", "1f1b", "zbv", "-p", "2", "-m", "4", "-F", "1,3", "-I", "1,3", "-W", "1,3")
    assert "zbv" in out and "left out" not in out
    whole = by_stage(schedule.Costs([1, 3], [0.5, 0.5, 2, 1], 2), 2, 4)
    assert (whole.F, whole.I, whole.W) == ([0.5, 0.5, 1.5, 1.5], [0.5, 0.5, 2, 1], 1)
    assert by_stage(schedule.Costs([0.5, 0.5, 2, 1]), 2, 2).F == [1, 3]
    with pytest.raises(ScheduleError, match="costs of transfers are per stage"):
        by_stage(schedule.Costs([1, 3], comm={(0, 1): 1.0}), 2, 4)


def test_simulate_explains_idle_time() -> None:
    out = run("simulate", "1f1b", "-p", "2", "-m", "4", "-F", "1,2", "-I", "1,2", "-W", "1,2")
    assert re.search(r"│ +0 │ +12 │ +3 │ +0 │ +12 │", out) and re.search(r"│ +1 │ +24 │ +3 │ +0 │ +0 │", out)


def test_costs_from_a_file(tmp_path: Path) -> None:
    schedule.write_costs(tmp_path / "costs.json", schedule.Costs((1, 2), (1, 2), (1, 2)))
    assert run("simulate", "1f1b", "-p", "2", "-m", "4", "--costs", str(tmp_path / "costs.json")) == run(
        "simulate", "1f1b", "-p", "2", "-m", "4", "-F", "1,2", "-I", "1,2", "-W", "1,2"
    )
    with pytest.raises(ScheduleError, match="-F '1,x': expected a number"):
        run("simulate", "1f1b", "-F", "1,x")


def test_draw_writes_the_format_of_the_suffix(tmp_path: Path) -> None:
    for name, begins in (("a.svg", "<svg"), ("a.html", "<!doctype html>"), ("a.json", '{"traceEvents"')):
        run("draw", "1f1b", "zbv", "-o", str(tmp_path / name))
        assert (tmp_path / name).read_text().startswith(begins)
    assert run("draw", "gpipe", "-p", "2", "-m", "2").startswith("gpipe\nrank 0 | 0 1 ")


def test_search_finds_and_writes(tmp_path: Path) -> None:
    words = ("-p", "3", "-m", "6", "-F", "1,2,1", "-I", "1,2,1", "-W", "1,1,2", "--memory-limit", "4", "--seconds", "0.5")
    out = run("search", *words, "-o", str(tmp_path / "found.csv"))
    assert "makespan" in out
    found = schedule.from_csv(tmp_path / "found.csv")
    schedule.validate(found)
    assert max(schedule.simulate(found).peak_activations) <= 4


@pytest.mark.parametrize("command", ["list", "show", "simulate", "compare", "search", "draw"])
def test_help_fits_and_has_an_example(command: str) -> None:
    result = CliRunner().invoke(app, ["schedule", command, "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert result.exit_code == 0 and max(map(len, result.output.splitlines())) <= 80
    assert command == "list" or f"Example: autofunc schedule {command}" in result.output


def test_needs_no_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from autofunc.cli.main import app;"
        "CliRunner().invoke(app, ['schedule', 'compare'], catch_exceptions=False); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
