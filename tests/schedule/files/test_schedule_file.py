"""Files: torch's CSV both ways, against torch itself, and our JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import pipelining
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime
from torch.testing._internal.distributed.fake_pg import FakeStore

from autofunc import schedule
from autofunc.errors import ScheduleError

RANKS, MICROBATCHES = 4, 8


@pytest.fixture(scope="module")
def _fake_ranks() -> Iterator[None]:
    """Torch's stages ask a process group for their rank; a fake one needs no other process."""
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    yield
    dist.destroy_process_group()


def torch_stages(indices: tuple[int, ...], num_stages: int) -> list[PipelineStage]:
    return [PipelineStage(torch.nn.Linear(2, 2), index, num_stages, torch.device("cpu")) for index in indices]


def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).sum()


@pytest.mark.parametrize("name", schedule.names())
@pytest.mark.parametrize("form", ["compute_only", "compute_comms"])
@pytest.mark.usefixtures("_fake_ranks")
@pytest.mark.filterwarnings("ignore")
def test_torch_loads_ours(name: str, form: str, tmp_path: Path) -> None:
    s = schedule.build(name, num_ranks=RANKS, num_microbatches=MICROBATCHES)
    given_form = schedule.lower(s, keep_overlapped=True) if form == "compute_comms" else s
    schedule.to_csv(given_form, tmp_path / "ours.csv")
    runtime = _PipelineScheduleRuntime(torch_stages(s.stages_of(0), s.num_stages), MICROBATCHES, loss_fn=loss)
    runtime._load_csv(str(tmp_path / "ours.csv"), form)
    runtime._dump_csv(str(tmp_path / "theirs.csv"), "compute_comms")
    theirs = schedule.from_csv(tmp_path / "theirs.csv")
    schedule.validate(theirs)
    if form == "compute_comms":
        assert theirs.rows == given_form.rows


@pytest.mark.parametrize(
    ("torch_class", "stages", "makespan"),
    [
        (pipelining.ScheduleInterleaved1F1B, (0, 4), 28.5),
        (pipelining.ScheduleLoopedBFS, (0, 4), 28.5),
        (pipelining.ScheduleInterleavedZeroBubble, (0, 4), 25.5),
        (pipelining.ScheduleZBVZeroBubble, (0, 7), 25.5),
        (pipelining.ScheduleDualPipeV, (0, 7), 25.5),
    ],
)
@pytest.mark.usefixtures("_fake_ranks")
@pytest.mark.filterwarnings("ignore")
def test_tables_of_torch(torch_class: Any, stages: tuple[int, int], makespan: float, tmp_path: Path) -> None:
    theirs = torch_class(torch_stages(stages, 2 * RANKS), MICROBATCHES, loss_fn=loss)
    for form in ("compute_only", "compute_comms"):
        theirs._dump_csv(str(tmp_path / "theirs.csv"), form)
        read = schedule.from_csv(tmp_path / "theirs.csv")
        schedule.validate(read)
        if form == "compute_only":
            assert schedule.simulate(read, schedule.Costs(0.5, 0.5, 0.5)).makespan == makespan


def torch_table(torch_class: Any) -> str:
    order = torch_class(torch_stages((0,), RANKS)[0], MICROBATCHES, loss_fn=loss)._get_pipeline_order()
    return "\n".join(",".join("" if action is None else str(action) for action in order[rank]) for rank in range(RANKS))


@pytest.mark.usefixtures("_fake_ranks")
@pytest.mark.filterwarnings("ignore")
def test_gpipe_of_torch() -> None:
    theirs = schedule.from_text(torch_table(pipelining.ScheduleGPipe))
    schedule.validate(theirs)
    assert schedule.simulate(theirs).makespan == 33


@pytest.mark.usefixtures("_fake_ranks")
@pytest.mark.filterwarnings("ignore")
def test_1f1b_of_torch_is_wrong_on_its_last_rank() -> None:
    with pytest.raises(ScheduleError, match=r"rank 3, position 1, 3B0: stage 3, microbatch 0 has 3B0; expected F once"):
        schedule.validate(schedule.from_text(torch_table(pipelining.Schedule1F1B)))


@given(st.sampled_from(schedule.names()), st.integers(1, 6), st.integers(1, 6))
def test_round_trips(tmp_path_factory: pytest.TempPathFactory, name: str, p: int, m: int) -> None:
    folder = tmp_path_factory.mktemp("tables")
    s = schedule.build(name, num_ranks=p, num_microbatches=m + 2 * p)
    for form in (s, schedule.lower(s, unshard="each_use")):
        schedule.to_json(form, folder / "table.json")
        assert schedule.from_json(folder / "table.json") == form
        schedule.to_csv(form, folder / f"{name}.csv")
        assert schedule.from_csv(folder / f"{name}.csv") == form


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", 'is not a schedule: expected "format": "autofunc.schedule"'),
        ('{"format": "autofunc.schedule", "version": 9}', "has version 9; this release reads version 1"),
        ('{"format": "autofunc.schedule", "version": 1, "name": "x"}', "lacks num_microbatches, placement, rows"),
    ],
)
def test_json_that_cannot_be_read(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(ScheduleError, match=message):
        schedule.from_json(tmp_path / "bad.json")


def test_a_missing_file_suggests_near_names(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("0F0 0B0")
    with pytest.raises(ScheduleError, match=r"there is no file .*mime.csv'; did you mean .*mine.csv\?"):
        schedule.read_file(tmp_path / "mime.csv")
    with pytest.raises(ScheduleError, match=r"unknown suffix '\.yaml'"):
        schedule.read_file(tmp_path / "mine.yaml")


def test_a_rank_without_actions_is_kept(tmp_path: Path) -> None:
    s = schedule.from_actions([
        [schedule.parse_action("0F0"), schedule.parse_action("0B0")], [],
        [schedule.parse_action("1F0"), schedule.parse_action("1B0")],
    ], "gap")  # fmt: skip
    schedule.to_csv(s, tmp_path / "gap.csv")
    assert schedule.from_csv(tmp_path / "gap.csv") == s and s.placement == (0, 2)


def test_tables_of_spreadsheets(tmp_path: Path) -> None:
    (tmp_path / "excel.csv").write_bytes('\ufeff"0F0","0B0",\r\n"1F0","1B0"\r\n'.encode())
    assert schedule.from_csv(tmp_path / "excel.csv").num_ranks == 2
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ScheduleError, match="cannot read"):
        schedule.from_csv(tmp_path / "binary.csv")
    (tmp_path / "bad.csv").write_text("0F0,0B0\n1F0,1X0")
    with pytest.raises(ScheduleError, match=r"bad.csv: line 2, column 2: '1X0': unknown kind"):
        schedule.from_csv(tmp_path / "bad.csv")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 5}, "rows is 5; expected list"),
        ({"rows": [["0F0"]]}, "rows are actions as text"),
        ({"placement": [0, 3]}, "placement puts stage 1 on rank 3; expected one of the 2 ranks"),
        ({"num_microbatches": None}, "num_microbatches is None; expected int"),
    ],
)
def test_json_with_wrong_fields(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    schedule.to_json(schedule.build("1f1b", num_ranks=2, num_microbatches=2), tmp_path / "t.json")
    document = json.loads((tmp_path / "t.json").read_text()) | change
    (tmp_path / "t.json").write_text(json.dumps(document))
    with pytest.raises(ScheduleError, match=message):
        schedule.from_json(tmp_path / "t.json")


def test_json_is_readable(tmp_path: Path) -> None:
    schedule.to_json(schedule.build("1f1b", num_ranks=2, num_microbatches=2), tmp_path / "table.json")
    document = json.loads((tmp_path / "table.json").read_text())
    assert document["rows"] == ["0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1"] and document["placement"] == [0, 1]
