"""Loaders: whole microbatches of real rows, the same draws everywhere, and rows of any clear kind."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from autofunc.batch import COUNTS
from autofunc.data import START, Part, Position, first_rows, make_loader, text_columns
from autofunc.errors import DataError


def numbers(count: int, masked: tuple[int, ...] = ()) -> list[dict[str, torch.Tensor]]:
    return [{"ids": torch.full((2,), i), "labels": torch.full((2,), -100 if i in masked else i)} for i in range(count)]


def parts_of(dataset: Any, rows: int, microbatch: int, **options: Any) -> list[Part]:
    return list(make_loader(dataset, rows, microbatch=microbatch, **{"seed": 0, "shuffle": False, **options}))


def seen(part: Part) -> tuple[list[int], list[float]]:
    return part.batch["ids"][:, 0].tolist(), part.batch[COUNTS].tolist()


def test_a_short_batch_is_whole_microbatches_and_one_of_what_is_left() -> None:
    parts = parts_of(numbers(15), 8, 2)
    assert [part.ends_batch for part in parts] == [True, False, True]
    assert [part.num_rows for part in parts] == [8, 6, 1]
    assert seen(parts[0]) == (list(range(8)), [1.0] * 8)
    assert seen(parts[1]) == ([8, 9, 10, 11, 12, 13, 13, 13], [1.0] * 6 + [0.0] * 2)
    assert seen(parts[2]) == ([14, 14, 14, 14], [1.0, 0.0, 0.0, 0.0])
    assert len(make_loader(numbers(15), 8, microbatch=2, seed=0, shuffle=False)) == 3
    assert [seen(part)[0] for part in parts_of(numbers(15), 8, 2, drop_last=True)] == [list(range(8))]


@pytest.mark.parametrize("length", range(1, 17))
def test_places_together_have_each_row_once(length: int) -> None:
    each = [parts_of(numbers(length), 8, 2, place=place, places=2) for place in range(2)]
    assert len({tuple(part.num_rows for part in parts) for parts in each}) == 1, "the same parts at the same time"
    counted = [
        int(row) for parts in zip(*each, strict=True) for part in parts
        for row, counts in zip(*seen(part), strict=True) if counts
    ]  # fmt: skip
    assert counted == list(range(length))
    for part in each[0]:
        for counts in part.batch[COUNTS].view(2, -1):
            assert len(set(counts.tolist())) == 1, "a microbatch has real rows only, or none"


def test_rows_without_labels_do_not_count_and_are_not_alone_in_a_microbatch() -> None:
    (part,) = parts_of(numbers(8, masked=(1, 4, 5)), 8, 2)
    assert seen(part) == ([0, 1, 2, 3, 0, 0, 6, 7], [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0])
    (part,) = parts_of([{"ids": torch.zeros(2).long(), "goal": torch.tensor(-100 if i else 1)} for i in range(2)], 2, 1)
    assert part.batch[COUNTS].tolist() == [1.0, 0.0] and part.batch["goal"].tolist() == [1, 1], "under any name"
    two = [{"ids": torch.zeros(2).long(), "labels": torch.tensor(1), "next_label": torch.tensor(-100)}]
    assert parts_of(two, 1, 1)[0].batch[COUNTS].tolist() == [1.0], "one of two labels is one"
    floating = [{"x": torch.zeros(2), "labels": torch.full((2,), -100.0)}]
    assert parts_of(floating, 1, 1)[0].batch[COUNTS].tolist() == [1.0], "a number to predict"
    with pytest.raises(DataError, match="no row of the dataset has a label"):
        parts_of(numbers(2, masked=(0, 1)), 2, 1)


def test_order_is_a_function_of_the_seed() -> None:
    def order(seed: int) -> list[list[int]]:
        loader = make_loader(numbers(20), 4, microbatch=2, seed=seed, shuffle=True)  # type: ignore[arg-type]
        return [[row for part in loader for row in part.batch["ids"][:, 0].tolist()] for _ in range(2)]

    assert order(1) == order(1) != order(2)
    first, second = order(1)
    assert first != second and sorted(first) == sorted(second) == list(range(20)), "each epoch has its own order"


@pytest.mark.parametrize("options", [{}, {"drop_last": True}, {"shuffle": False, "num_workers": 2}], ids=str)
def test_a_loader_goes_on_from_any_batch(options: dict[str, Any]) -> None:
    """Two epochs, of which the first is begun where another loader has ended, by as many places or fewer."""

    def rows(place: int, places: int, start: Position = START, epochs: int = 2) -> list[Any]:
        given = {"seed": 3, "shuffle": True, **options, "place": place, "places": places, "start": start}
        loader = make_loader(numbers(21), 8, microbatch=2, **given)  # type: ignore[arg-type]
        return [(seen(part), part.num_rows, part.after, part.ends_batch) for _ in range(epochs) for part in loader]

    for place, places in ((0, 1), (1, 2)):
        whole = rows(place, places)
        for number, (_, _, after, ends) in enumerate(whole, start=1):
            if ends:
                left = 2 - (after.epoch - 1)
                assert rows(place, places, after, left) == whole[number:]
    assert [after for *_, after, ends in rows(0, 1) if ends] == [
        Position(1, 8), *([Position(1, 16)] if not options.get("drop_last") else []), Position(2), Position(2, 8),
        *([Position(2, 16)] if not options.get("drop_last") else []), Position(3),
    ]  # fmt: skip


class Draws:
    """Draws from every global generator, and where the process is."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": [random.random(), np.random.rand(), torch.rand(()).item()]}


@pytest.mark.parametrize("workers", [0, 2])
def test_what_rows_draw_depends_on_seed_epoch_and_index(workers: int) -> None:
    def epochs(**options: Any) -> list[torch.Tensor]:
        loader = make_loader(Draws(), 2, microbatch=1, **{"seed": 3, "shuffle": False, "num_workers": workers, **options})  # type: ignore[arg-type]
        random.random(), np.random.rand(), torch.rand(1)  # whatever a rank has drawn before
        return [torch.cat([part.batch["x"] for part in loader]) for _ in range(2)]

    first, second = epochs()
    assert len(first.unique()) == 18 and not torch.equal(first, second)
    assert torch.equal(first, epochs(num_workers=0)[0])
    assert not torch.equal(first, epochs(seed=4)[0])
    shuffled = epochs(shuffle=True)[0]
    assert torch.equal(shuffled.sort(0).values, first.sort(0).values), "whenever a row is read"


def test_generators_are_left_as_they_were() -> None:
    def drawn() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), torch.rand(()).item()

    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(7)
    expected = drawn()
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(7)
    first_rows(Draws(), 4)  # type: ignore[arg-type]
    assert drawn() == expected


@pytest.mark.parametrize(
    "row",
    [
        {"x": [1, 2], "y": 3},
        {"x": np.array([1, 2]), "y": np.int64(3)},
        {"x": torch.tensor([1, 2]), "y": torch.tensor(3), "text": "words", "words": ["a", "b"], "array": np.array(["a"])},
        {"x": (1, 2), "y": 3},
        {"x": [torch.tensor(1), torch.tensor(2)], "y": 3, "bytes": b"abc"},
    ],
    ids=["lists", "arrays", "text", "tuples", "lists of tensors"],
)
def test_rows_of_any_clear_kind(row: dict[str, Any]) -> None:
    batch = first_rows([row, row], 2)  # type: ignore[arg-type]
    assert {name: leaf.tolist() for name, leaf in batch.items()} == {"x": [[1, 2], [1, 2]], "y": [3, 3]}
    assert text_columns([row]) == [name for name in row if name not in "xy"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((torch.zeros(1), torch.zeros(1)), "row 0 of the dataset is a tuple; expected a mapping of names to tensors"),
        (None, "row 0 of the dataset is None; expected"),
        ({"text": "words"}, r"row 0 of the dataset has only text \(text\)"),
        ({"x": None}, "row 0 of the dataset: 'x' is None; expected"),
        ({"x": {"a": 1}}, "row 0 of the dataset: 'x' is a dict; expected"),
        ({"x": [[1], [1, 2]]}, "row 0 of the dataset: 'x' cannot be a tensor"),
        ({"x": [1, None]}, "row 0 of the dataset: 'x' cannot be a tensor"),
    ],
)
def test_rows_that_are_none(row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        first_rows([row], 1)  # type: ignore[arg-type]


def test_rows_that_do_not_fit_or_cannot_be_read() -> None:
    with pytest.raises(DataError, match="3 rows, fewer than one batch of 4"):
        make_loader(numbers(3), 4, microbatch=2, seed=0, shuffle=False, drop_last=True)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"one batch: 'x' is \(2,\) and \(3,\); pad them"):
        parts_of([{"x": torch.zeros(2)}, {"x": torch.zeros(3)}], 2, 1)
    with pytest.raises(DataError, match=r"'y' is .* and nothing"):
        parts_of([{"y": torch.zeros(2)}, {"x": torch.zeros(2)}], 2, 1)

    class Broken(Draws):
        def __getitem__(self, index: int) -> dict[str, Any]:
            raise OSError("the disk is gone")

    with pytest.raises(DataError, match="row 0 of the dataset: OSError: the disk is gone"):
        parts_of(Broken(), 2, 1)
