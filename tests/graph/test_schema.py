"""What is read from an operator's schema: arguments with their defaults, and whether it draws random numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from autofunc.graph.schema import arguments, is_mutable, is_operator, is_pointwise, is_random

aten = torch.ops.aten


def call(operator: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A node that calls an operator; "x" among its arguments stands for a tensor."""
    graph = fx.Graph()
    x = graph.placeholder("x")

    def value(argument: Any) -> Any:
        return [value(part) for part in argument] if isinstance(argument, list) else x if argument == "x" else argument

    return graph.call_function(operator, tuple(map(value, args)), {name: value(each) for name, each in kwargs.items()})


def test_arguments_by_name() -> None:
    node = call(aten.scaled_dot_product_attention.default, "x", "x", "x", is_causal=True)
    x = node.args[0]
    assert arguments(node) == {
        "query": x, "key": x, "value": x, "attn_mask": None, "dropout_p": 0.0, "is_causal": True, "scale": None,
        "enable_gqa": False,
    }  # fmt: skip
    assert list(arguments(node))[:4] == ["query", "key", "value", "attn_mask"]


def test_what_is_an_operator() -> None:
    assert is_operator(call(aten.relu.default, "x"))
    assert not is_operator(call(torch.relu, "x"))
    assert not is_operator(call(aten.relu.default, "x").graph.output("x"))
    with pytest.raises(AssertionError, match="is not an operator"):
        arguments(call(torch.relu, "x"))


def test_kinds_of_operators() -> None:
    assert is_pointwise(call(aten.tanh.default, "x")) and not is_pointwise(call(aten.mm.default, "x", "x"))
    assert is_mutable(call(aten.add_.Tensor, "x", "x")) and is_mutable(call(aten.add.out, "x", "x", out="x"))
    assert is_mutable(call(aten._foreach_add_.Scalar, ["x"], 1.0))
    assert not any(is_mutable(call(each, "x")) for each in (aten.relu.default, aten.t.default, torch.relu_))


LSTM = (["x", "x"], ["x"] * 8, True, 2)
GRU = ("x", ["x"] * 8, True, 2)


@pytest.mark.parametrize(
    ("random", "operator", "args", "kwargs"),
    [
        # attention: by position, by name, by default
        (False, aten.scaled_dot_product_attention.default, ("x", "x", "x"), {}),
        (False, aten.scaled_dot_product_attention.default, ("x", "x", "x", None, 0.0), {}),
        (True, aten.scaled_dot_product_attention.default, ("x", "x", "x", None, 0.1), {}),
        (True, aten.scaled_dot_product_attention.default, ("x", "x", "x"), {"dropout_p": 0.1}),
        (False, aten._scaled_dot_product_flash_attention_for_cpu.default, ("x", "x", "x"), {"attn_mask": "x"}),
        (False, aten._scaled_dot_product_flash_attention_for_cpu.default, ("x", "x", "x", 0.0), {}),
        (True, aten._scaled_dot_product_flash_attention_for_cpu.default, ("x", "x", "x", 0.5), {}),
        (False, aten._scaled_dot_product_efficient_attention.default, ("x", "x", "x", None, True), {}),
        # recurrent layers: a probability and a mode
        (False, aten.lstm.input, ("x", *LSTM, 0.0, True, False, True), {}),
        (False, aten.lstm.input, ("x", *LSTM, 0.3, False, False, True), {}),
        (True, aten.lstm.input, ("x", *LSTM, 0.3, True, False, True), {}),
        (True, aten.lstm.data, ("x", "x", *LSTM, 0.3, True, False), {}),
        (False, aten.gru.input, ("x", *GRU, 0.0, True, False, True), {}),
        (True, aten.gru.input, ("x", *GRU, 0.3, True, False, True), {}),
        (False, aten.rnn_tanh.input, ("x", *GRU, 0.3, False, False, True), {}),
        (True, aten.rnn_relu.input, ("x", *GRU, 0.3, True, False, True), {}),
        # dropout
        (True, aten.dropout.default, ("x", 0.5, True), {}),
        (False, aten.dropout.default, ("x", 0.5, False), {}),
        (False, aten.dropout_.default, ("x", 0.0, True), {}),
        (True, aten.native_dropout.default, ("x", 0.5, True), {}),
        (True, aten.native_dropout.default, ("x", 0.5, None), {}),  # None trains
        (False, aten.native_dropout.default, ("x", 0.5, False), {}),
        # a mode that is not given has its default
        (False, aten.rrelu_with_noise.default, ("x", "x"), {}),
        (True, aten.rrelu_with_noise.default, ("x", "x", 0.1, 0.3, True), {}),
        # draws, whatever they are given
        (True, aten.rand.default, ([2],), {}),
        (True, aten.bernoulli.p, ("x", 0.5), {}),
        (True, aten.bernoulli.Tensor, ("x", "x"), {}),
        (True, aten.multinomial.default, ("x", 1), {}),
        # no draw
        (False, aten.relu.default, ("x",), {}),
        (False, torch.rand, ([2],), {}),  # a function of Python is nobody's operator
    ],
)
def test_randomness(random: bool, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert is_random(call(operator, *args, **kwargs)) is random
