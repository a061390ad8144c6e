"""Attention over context parallel ranks equals attention of the whole: with threads as ranks, and over gloo."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from autofunc.context_parallel.attention import check_method, context_attention, parts
from autofunc.context_parallel.attention_blocks import block, block_backward, merge
from autofunc.context_parallel.ranks import known_as
from autofunc.context_parallel.token_chunks import check_length, in_order, own_part, spread_out
from autofunc.errors import BatchError, ModelError
from autofunc.shard.context_ranks import GroupRanks
from tests.cases import mesh_of
from tests.context_parallel.threads import Threads, on_ranks
from tests.pool import WorkerPool

MASKS = ("none", "causal", "window", "padding", "additive")
METHODS = ("allgather", "ring")


def case(mask: str, rows: int, tokens: int, heads: int, groups: int, features: int, dtype: torch.dtype) -> dict[str, Any]:
    """Whole arguments of attention."""
    generator = torch.Generator().manual_seed(tokens)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    made: dict[str, Any] = {"query": draw(rows, heads, tokens, features), "cotangent": draw(rows, heads, tokens, features)}
    made |= {name: draw(rows, groups, tokens, features) for name in ("key", "value")}
    place = torch.arange(tokens)
    distance = place[:, None] - place
    if mask == "window":
        made["mask"] = (distance >= 0) & (distance < 3)
    elif mask == "padding":  # a different number of tokens in each row
        lengths = 1 + torch.arange(rows) % tokens
        made["mask"] = (place < lengths[:, None])[:, None, None, :]
    elif mask == "additive":  # as in ALiBi, with hidden keys and a row that sees none
        added = -distance.abs().to(dtype)[None].repeat(heads, 1, 1)
        added[:, distance < 0] = torch.finfo(dtype).min
        added[0, 1] = float("-inf")
        made["mask"] = added
    made["is_causal"] = mask == "causal"
    return made


def whole_attention(given: dict[str, Any]) -> list[Tensor]:
    """Output and gradients of torch's attention."""
    leaves = [given[name].clone().requires_grad_() for name in ("query", "key", "value")]
    mask = given.get("mask")
    output = scaled_dot_product_attention(*leaves, mask, is_causal=given["is_causal"], enable_gqa=True)
    return [output.detach(), *torch.autograd.grad(output, leaves, given["cotangent"])]


def cut_attention(given: dict[str, Any], rank: int, size: int, ranks: str, method: str) -> list[Tensor]:
    """The same for one rank's tokens."""
    leaves = [own_part(given[name], 2, rank, size).requires_grad_() for name in ("query", "key", "value")]
    mask = given.get("mask")
    if mask is not None and mask.shape[-2] > 1:
        mask = own_part(mask, -2, rank, size)
    output = context_attention(*leaves, mask, is_causal=given["is_causal"], ranks=ranks, method=method)
    cotangent = own_part(given["cotangent"], 2, rank, size)
    return [output.detach(), *torch.autograd.grad(output, leaves, cotangent)]


def assert_close(found: Sequence[Sequence[Tensor]], expected: Sequence[Tensor], tolerance: float) -> None:
    for name, of_ranks, whole in zip(("output", "query", "key", "value"), zip(*found, strict=True), expected, strict=True):
        # a query that sees one key has no gradient but rounding, which is relative to values of about 1
        difference = (in_order(of_ranks, 2) - whole).abs().max() / whole.abs().max().clamp_min(1e-2)
        assert difference < tolerance, f"{name}: {difference}"


def expected_counts(size: int, method: str) -> dict[str, int]:
    if method == "allgather":  # one forward; one back, and one for the gradients
        return {"gather": 2, "reduce_scatter": 1}
    return {"rotate": (size - 1) + (size - 1) + size}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
def test_matches_attention_of_the_whole(size: int, mask: str, method: str, dtype: torch.dtype, tolerance: float) -> None:
    whole = case(mask, 2, 8 * size, 4, 2, 8, dtype)
    found, counts = on_ranks(size, lambda ranks, name: cut_attention(whole, ranks.rank, size, name, method))
    assert_close(found, whole_attention(whole), tolerance)
    assert all(count == expected_counts(size, method) for count in counts)


@given(
    size=st.sampled_from([1, 2, 3, 4]),
    mask=st.sampled_from(MASKS),
    method=st.sampled_from(METHODS),
    each=st.integers(1, 3),
    rows=st.integers(1, 3),
    groups=st.integers(1, 2),
    group=st.integers(1, 3),
    features=st.sampled_from([1, 3, 8]),
)
def test_matches_for_any_sizes(
    size: int, mask: str, method: str, each: int, rows: int, groups: int, group: int, features: int
) -> None:  # fmt: skip
    whole = case(mask, rows, 2 * size * each, groups * group, groups, features, torch.float64)
    found, _ = on_ranks(size, lambda ranks, name: cut_attention(whole, ranks.rank, size, name, method))
    assert_close(found, whole_attention(whole), 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_of_a_mask(method: str) -> None:
    """A trained bias by distance, shared by all rows; values have fewer features than keys."""
    size, whole = 2, case("additive", 2, 8, 2, 2, 4, torch.float64)
    bias = torch.randn(2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    value, cotangent = whole["value"][..., :3], whole["cotangent"][..., :3].contiguous()
    leaf = bias.clone().requires_grad_()
    output = scaled_dot_product_attention(whole["query"], whole["key"], value, leaf)
    (expected,) = torch.autograd.grad(output, leaf, cotangent)

    def run(ranks: Threads, name: str) -> Tensor:
        q, k, v, g = (own_part(x, 2, ranks.rank, size) for x in (whole["query"], whole["key"], value, cotangent))
        own = own_part(bias, 1, ranks.rank, size).requires_grad_()
        return torch.autograd.grad(context_attention(q, k, v, own, ranks=name, method=method), own, g)[0]

    found, _ = on_ranks(size, run)
    torch.testing.assert_close(in_order(found, 1), expected, rtol=0, atol=1e-13)


def test_bf16_is_summed_in_fp32() -> None:
    size, whole = 4, case("causal", 1, 64, 2, 1, 16, torch.bfloat16)
    exact = whole_attention({name: x.double() if isinstance(x, Tensor) else x for name, x in whole.items()})
    found, _ = on_ranks(size, lambda ranks, name: cut_attention(whole, ranks.rank, size, name, "ring"))
    assert_close([[x.double() for x in each] for each in found], exact, 2e-2)


def over_processes(size: int, mask: str, method: str) -> tuple[list[Tensor], int]:
    """Attention on a cp axis of gloo processes, and this process's place on the axis."""
    group = mesh_of(dp_replicate=4 // size, tp=size).get_group("tp")
    ranks = GroupRanks(group)
    if mask == "none":
        ranks._links = None  # as on several machines
    known_as(group.group_name, ranks)
    whole = case(mask, 2, 8 * size, 4, 2, 8, torch.float32)
    return cut_attention(whole, ranks.rank, size, group.group_name, method), ranks.rank


@pytest.mark.parametrize(
    ("size", "mask", "method"),
    [
        (2, "causal", "ring"),
        (4, "causal", "allgather"),
        (4, "none", "allgather"),
        *(
            pytest.param(*each, marks=pytest.mark.full)
            for each in [(2, "window", "allgather"), (4, "padding", "ring"), (4, "causal", "ring"), (2, "none", "ring")]
        ),
    ],
)
def test_over_processes(workers: WorkerPool, size: int, mask: str, method: str) -> None:
    found = {place: made for made, place in workers.run(over_processes, size, mask, method)}
    whole = case(mask, 2, 8 * size, 4, 2, 8, torch.float32)
    assert_close([found[place] for place in range(size)], whole_attention(whole), 2e-6)


# --- its pieces ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_all_ranks_have_the_same_work_under_a_causal_mask(size: int) -> None:
    for rank in range(size):
        own = own_part(torch.arange(4 * size), 0, rank, size)
        for source in range(size):
            part, keys = parts(rank, source, 4, is_causal=True), own_part(torch.arange(4 * size), 0, source, size)
            seen = torch.zeros(4, 4, dtype=torch.bool)
            seen[part.queries, part.keys] = True
            if part.is_diagonal:
                seen &= torch.ones(4, 4, dtype=torch.bool).tril()
            else:
                assert seen.sum() == 8, "half of all pairs"
            assert torch.equal(seen, own[:, None] >= keys)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_chunks(size: int) -> None:
    x = torch.randn(2, 4 * size, 3)
    pieces = [own_part(x, 1, rank, size) for rank in range(size)]
    assert torch.equal(in_order(pieces, 1), x)
    assert torch.equal(sum(spread_out(piece, 1, rank, size) for rank, piece in enumerate(pieces)), x)


def test_the_written_out_block_agrees_with_the_kernel() -> None:
    """Masked and grouped: values with one more feature than keys do not fit the kernel."""
    given = case("window", 2, 8, 4, 2, 8, torch.float64)
    q, k, v = given["query"], given["key"], given["value"]
    mask = torch.zeros(8, 8, dtype=torch.float64).masked_fill(~given["mask"], float("-inf"))
    wide = torch.cat([v, v[..., :1]], -1)
    output, total = block(q, k, v, mask, False, 0.3)
    by_hand, by_hand_total = block(q, k, wide, mask, False, 0.3)
    torch.testing.assert_close(by_hand[..., :8], output)
    torch.testing.assert_close(by_hand_total, total)
    g = given["cotangent"]
    found = block_backward(g, q, k, v, mask, output, total, False, 0.3, of_mask=False)
    wide_g = torch.cat([g, torch.zeros_like(g[..., :1])], -1)
    hand = block_backward(wide_g, q, k, wide, mask, by_hand, total, False, 0.3, of_mask=False)
    torch.testing.assert_close(hand.query, found.query)
    torch.testing.assert_close(hand.key, found.key)
    torch.testing.assert_close(hand.value[..., :8], found.value)


def test_merging_for_queries_that_see_nothing() -> None:
    output, total = torch.zeros(1, 1, 1, 2), torch.full((1, 1, 1), float("-inf"))
    merge(output, total, torch.zeros(1, 1, 1, 2), total.clone())
    assert torch.equal(output, torch.zeros(1, 1, 1, 2))
    merge(output, total, torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1))
    assert torch.equal(output, torch.ones(1, 1, 1, 2)) and total.item() == 0


def test_lengths_that_do_not_divide() -> None:
    check_length(16, 4, "it")
    with pytest.raises(
        BatchError, match=r"'input_ids' has 13 tokens.*cp=2.*4 equal chunks.*multiple of 4, such as 12 or 16"
    ):
        check_length(13, 2, "'input_ids'")
    with pytest.raises(BatchError, match="such as 8"):
        check_length(3, 4, "it")


def test_an_unknown_method() -> None:
    with pytest.raises(ModelError, match=r"'rings' is unknown; did you mean 'ring'\?|'rings'"):
        check_method("rings")
