"""Schedule files that are wrong or hostile."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hostile.judge import Case


def file(name: str, content: bytes | str, *says: str, called: str = "") -> Case:
    """A case of one file."""

    def write(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape"))
        return path

    return Case(called or name, write, (name, *says))


def other(name: str, make: Callable[[Path], Any], *says: str) -> Case:
    """A case of something that is no ordinary file."""

    def write(folder: Path) -> Path:
        make(folder / name)
        return folder / name

    return Case(name, write, says)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


def table(name: str, text: bytes | str, *says: str) -> Case:
    return file(f"{name}.csv", text, *says)


def document(called: str, /, *says: str, **changes: Any) -> Case:
    """JSON that is right but for some fields."""
    right = {
        "format": "autofunc.schedule", "version": 1, "name": "x", "num_microbatches": 1, "placement": [0, 1],
        "rows": ["0F0 0B0", "1F0 1B0"],
    }  # fmt: skip
    return file(f"{called}.json", json.dumps(right | changes), *says)


def _late_ranks(count: int) -> str:
    """Rank 0 waits for a backward, and all others for its second forward."""
    return "0F0,0B0,0F1,0B1\n" + "\n".join(f"{r}F0,{r}F1,{r}B0,{r}B1" for r in range(1, count))


CELLS = [
    table("bigmb", "0F0,0F999999999,0B0", "line 1, column 2", "0F999999999", "microbatch"),
    table("bigmb_backward", "0F0,0B999999999", "line 1, column 2", "0B999999999"),
    table("bigmb_send", "0F0,0SEND_F999999999", "line 1, column 2"),
    table("manymb", "0F0,0F65535,0B0", "65,536 microbatches", "line 1, column 2"),
    table("bigstage", "999999999F0", "line 1, column 1", "stage"),
    table("bigstage_second_line", "0F0,0B0\n999999999F0", "line 2, column 1"),
    table("manystages", "0F0,0B0\n60000F0,60000B0", "no rank runs the forward of stage 1"),
    table("bigpeer", "0F0,0SEND_F0>999999999,0B0", "line 1, column 2"),
    table("bigpeer_back", "0F0,0RECV_B0<999999999,0B0", "line 1, column 2"),
    table("ten_digits", "0F0,0F1234567890", "line 1, column 2", "'0F1234567890' is not an action"),
    table("stage_of_ten_digits", "1234567890F0", "line 1, column 1"),
    table("million_digits", "0F" + "9" * 10**6, "line 1, column 1", "is not an action"),
    table("long_word", "0F0\n" + "A" * 4 * 10**6, "line 2, column 1", "is not an action"),
    table("long_kind", f"0{'F' * 10**6}0", "line 1, column 1", "unknown kind"),
    table("far_column", "," * 65536 + "0X0", "line 1, column 65537"),
    table("far_line", "0F0,0B0\n" + "\n" * 5000 + "1F0,1X0", "line 5002, column 2", "unknown kind"),
    table("negative_stage", "-1F0", "line 1, column 1"),
    table("negative_microbatch", "0F0,0F-1", "line 1, column 2"),
    table("fraction", "0.5F0", "line 1, column 1"),
    table("exponent", "0F1e9", "line 1, column 1"),
    table("trailing", "0F0,0F0x", "line 1, column 2"),
    table("lower_case", "0f0", "line 1, column 1"),
    table("arabic_digits", "٠F٠", "line 1, column 1"),  # noqa: RUF001
    table("wide_digits", "0F0,0F１", "line 1, column 2"),  # noqa: RUF001
    table("no_microbatch", "0F", "line 1, column 1", "0F0"),
    table("sharding_microbatch", "0UNSHARD0,0F0", "line 1, column 1", "no microbatch"),
    table("unknown_kind", "0F0,0X0", "line 1, column 2", "unknown kind"),
    table("arrow_of_send", "0SEND_F0<1", "line 1, column 1"),
    table("arrow_of_forward", "0F0>1", "line 1, column 1"),
    table("arrow_of_receive", "0RECV_F0>1", "line 1, column 1"),
    table("semicolons", "0F0;0B0", "line 1, column 1"),
    table("open_pair", "(0F0;0B0", "line 1, column 1"),
    table("nameless_pair", "(0F0;0B0)", "line 1, column 1"),
    table("two_forwards", "0F0,(0F0;0F1)OVERLAP_F_B", "line 1, column 2", "expected a forward and a backward"),
    table("nested_pair", "((0F0;0B0)OVERLAP_F_B;0B0)OVERLAP_F_B", "line 1, column 1"),
    table("three_in_a_pair", "(0F0;0B0;0B1)OVERLAP_F_B", "line 1, column 1"),
    table("pair_of_sends", "(0SEND_F0;0B0)OVERLAP_F_B", "line 1, column 1"),
    table("many_brackets", "(" * 10**5, "line 1, column 1"),
    table("escape_codes", "0F0,\x1b[31m0B0", "line 1, column 2", r"\x1b[31m"),
    table("markup", "0F0,[bold]0B0[/x]", "line 1, column 2", "[bold]"),
    table("html", "0F0,<script>alert(1)</script>", "line 1, column 2", "<script>"),
    table("bidi", "0F0,0\u202eB0", "line 1, column 2", r"\u202e"),
    table("vertical_tab", "0F0,0B0\x0b1F0,1B0", "line 1, column 2"),
    table("line_separator", "0F0,0B0\u20281F0,1B0", "line 1, column 2"),
    table("no_break_space", "0F0\xa00B0", "line 1, column 1"),
    table("null", "0F0,\x000B0", "line 1, column 2"),
]

WHOLE = [
    table("empty", "", "no actions"),
    table("blank", "\n \n\t\n", "no actions"),
    table("commas", ",\n,\n", "no actions"),
    table("no_forward", "0B0", "no rank runs the forward of stage 0"),
    table("many_ranks", ",\n" * 200_000, "200,000 ranks"),
    table("binary", bytes(range(256)), "line 2", "UTF-8"),
    table("latin", b"0F0,0B0\n1F0,\xe4", "line 2", "UTF-8"),
    table("wide", "0F0,0B0".encode("utf-16"), "UTF-8"),
    table("packed", gzip.compress(b"0F0,0B0"), "UTF-8"),
    table("twice", "0F0,0F0,0B0", "rank 0, position 1", "exactly once"),
    table("twice_backward", "0F0,0B0,0B0", "rank 0, position 2", "exactly once"),
    table("often", "0F0," * 50_000 + "0B0", "rank 0, position 1", "exactly once"),
    table("no_backward", "0F0,0B0,0F1", "rank 0, position 2", "expected F once"),
    table("backward_first", "0B0,0F0", "rank 0, position 0", "needs"),
    table("two_ranks", "0F0,0B0\n0F1,0B1", "rank 1, position 0", "stage 0 is placed on rank 0"),
    table("deadlock", _late_ranks(2), "cannot go on", "rank 0, position 1"),
    table("wide_deadlock", _late_ranks(300), "cannot go on", "rank 0, position 1"),
    table("send_only", "0F0,0SEND_F0,0B0\n1F0,1B0", "rank 0, position 1", "receive is missing"),
    table("receive_only", "0F0,0B0\n1RECV_F0,1F0,1B0", "rank 1, position 0", "send is missing"),
    table("to_itself", "0F0,0SEND_F0>0,0B0", "rank 0, position 1"),
    table("to_nobody", "0F0,0SEND_F0,0B0", "rank 0, position 1"),
    table("w_alone", "0F0,0W0", "rank 0, position 0", "expected F once"),
    table("b_and_i", "0F0,0B0,0I0,0W0", "rank 0, position 0", "expected F once"),
    table("own_backward", "(0F0;0B0)OVERLAP_F_B", "rank 0, position 0", "its own backward"),
    table("not_gathered", "0F0,0UNSHARD,0B0", "rank 0, position 0"),
    table("let_go", "0UNSHARD,0F0,0RESHARD,0B0", "rank 0, position 3"),
    file("same.txt", "0F0 0B0\n0F0 0B0", "rank 1, position 0"),
    other("nowhere.csv", lambda path: None, "nowhere.csv", "there is no file"),
    other("fifo.csv", os.mkfifo, "fifo.csv", "is not a file"),
    other("folder.csv", Path.mkdir, "folder.csv", "is not a file"),
    other("dangling.csv", lambda path: path.symlink_to("gone"), "dangling.csv", "link"),
    other("circle.json", lambda path: path.symlink_to(path.name), "circle.json", "link"),
    other("device.csv", lambda path: path.symlink_to("/dev/zero"), "device.csv", "is not a file"),
    other("sparse.csv", sparse, "sparse.csv", "bytes"),
    other("sparse.json", sparse, "sparse.json", "bytes"),
    other("x" * 300 + ".csv", lambda path: None, "there is no file"),
    other("\udcff\x1b[31m.csv", lambda path: path.write_text("0X0"), r"\udcff\x1b[31m.csv", "line 1, column 1"),
    other("mine.yaml", lambda path: path.write_text("0F0"), "unknown schedule", "a .csv, .txt or .json file"),
]

DOCUMENTS = [
    file("deep.json", "[" * 10**5, "nested"),
    file("deep_object.json", '{"a":' * 10**5, "nested"),
    file("digits.json", '{"version": ' + "1" * 5000 + "}", "is not JSON"),
    file("cut.json", '{"format": "autofunc.schedule', "is not JSON", "line 1"),
    file("rest.json", '{"format": "autofunc.schedule"}\n]', "is not JSON", "line 2"),
    file("quotes.json", "{'format': 1}", "is not JSON", "line 1"),
    file("nothing.json", "", "is not JSON"),
    file("number.json", "7", "is not a schedule"),
    file("null.json", "null", "is not a schedule"),
    file("list.json", json.dumps([0] * 10**5), "is not a schedule"),
    file("other.json", "{}", "is not a schedule"),
    file("double.json", '{"format": "autofunc.schedule", "name": "a", "name": "b"}', "'name'", "twice"),
    file("wide.json", '{"format": 1}'.encode("utf-16"), "UTF-8"),
    document("format_list", "is not a schedule", format=["autofunc.schedule"]),
    document("version_true", "version", version=True),
    document("version_text", "version '1'", version="1"),
    document("version_long", "version", version="1" * 10**6),
    document("name_number", "name is 5", name=5),
    document("name_long", "name", name="x" * 4 * 10**6),
    document("microbatches_none", "num_microbatches is 0", num_microbatches=0),
    document("microbatches_negative", "num_microbatches is -1", num_microbatches=-1),
    document("microbatches_many", "1,000,000,000 microbatches", num_microbatches=10**9),
    document("microbatches_huge", "microbatches", num_microbatches=10**300),
    document("microbatches_true", "num_microbatches is True", num_microbatches=True),
    document("microbatches_fraction", "num_microbatches is 1.0", num_microbatches=1.0),
    document("microbatches_text", "num_microbatches is '1'", num_microbatches="1"),
    document("microbatches_list", "num_microbatches is [", num_microbatches=[1] * 10**5),
    document("microbatches_fewer", "rank 0, position 1", rows=["0F0 0F1 0B0 0B1", "1F0 1F1 1B0 1B1"]),
    document("microbatches_more", "microbatch", num_microbatches=2),
    document("placement_empty", "placement", placement=[]),
    document("placement_negative", "placement", "stage 1", placement=[0, -1]),
    document("placement_true", "placement", "stage 1", placement=[0, True]),
    document("placement_far", "placement", "stage 1", placement=[0, 2]),
    document("placement_long", "stages", placement=[0] * 200_000),
    document("placement_wrong", "rank 0, position 0", placement=[1, 0]),
    document("placement_more", "stage 2", placement=[0, 1, 1]),
    document("placement_text", "placement", placement="01"),
    document("rows_empty", "rows", placement=[], rows=[]),
    document("rows_blank", "forward", placement=[0], rows=[""]),
    document("rows_many", "ranks", placement=[0], rows=[""] * 10**5),
    document("rows_lists", "rows[0]", rows=[["0F0", "0B0"], ["1F0", "1B0"]]),
    document("rows_null", "rows[1]", rows=["0F0 0B0", None]),
    document("rows_mapping", "rows", rows={"0": "0F0 0B0"}),
    document("rows_cell", "rows[1], action 2", rows=["0F0 0B0", "1F0 1X0"]),
    document("rows_big", "rows[1], action 2", rows=["0F0 0B0", "1F0 1F999999999"]),
    document("rows_long", "rows[0], action 1", rows=["0" * 10**6, "1F0 1B0"]),
    document("rows_escape", "rows[1], action 2", rows=["0F0 0B0", "1F0 \x1b[31m1B0"]),
]

SCHEDULES = [*CELLS, *WHOLE, *DOCUMENTS]


def costs(name: str, text: str, *says: str) -> Case:
    return file(f"{name}.json", text, *says)


COSTS = [
    costs("list", "[1]", "expected a mapping"),
    costs("null", "null", "expected a mapping"),
    costs("deep", "[" * 10**5, "nested"),
    costs("digits", '{"F": ' + "1" * 5000 + "}", "is not JSON"),
    costs("twice", '{"F": 1, "F": 2}', "'F'", "twice"),
    costs("unknown", '{"G": 1}', "unknown key 'G'"),
    costs("unknown_long", json.dumps({"G" * 10**6: 1}), "unknown key"),
    costs("text", '{"F": "1"}', "F", "expected a number"),
    costs("true", '{"F": true}', "F", "expected a number"),
    costs("null_time", '{"F": null}', "F", "expected a number"),
    costs("nan", '{"F": NaN}', "F", "expected a number"),
    costs("infinite", '{"W": Infinity}', "W", "expected a number"),
    costs("huge", json.dumps({"F": 10**400}), "F", "expected a number"),
    costs("huge_in_list", json.dumps({"F": [1, 10**400]}), "F[1]", "expected a number"),
    costs("long_list", json.dumps({"F": [1] * 10**5 + ["x"]}), "F[100000]"),
    costs("nested_list", '{"F": [[1]]}', "F[0]"),
    costs("comm_list", '{"comm": [1, 2]}', "comm"),
    costs("comm_edge", '{"comm": {"0-1": 1}}', "comm names the edge '0-1'"),
    costs("comm_digits", '{"comm": {"0>²": 1}}', "comm names the edge"),
    costs("comm_far", '{"comm": {"0>99999999999999999999": 1}}', "comm names the edge"),
    costs("comm_time", '{"comm": {"0>1": "x"}}', "comm[0>1]"),
    costs("negative", '{"F": -1}', "F"),
    costs("latency_list", '{"latency": [1]}', "latency"),
    costs("overlap_list", '{"overlap": [1]}', "overlap"),
    costs("memory_list", '{"memory": [1]}', "memory"),
    costs("memory_nan", '{"memory": {"residuals": NaN, "weight_residuals": 1}}', "memory: residuals"),
    costs("memory_lacks", '{"memory": {"residuals": 1}}', "weight_residuals"),
    costs("memory_negative", '{"memory": {"residuals": -1, "weight_residuals": 1}}', "residuals"),
]
