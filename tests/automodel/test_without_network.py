"""Without a network, what is not in the cache of the hub is said at once."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
from huggingface_hub import constants

from autofunc.automodel.hub import folder_of
from autofunc.data.hellaswag import HellaSwag
from autofunc.data.tokenizer import load_tokenizer
from autofunc.errors import AutofuncError


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The addresses that were tried, of a machine without a network."""
    tried: list[Any] = []

    def refused(address: Any, *_: Any, **__: Any) -> socket.socket:
        tried.append(address)
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", refused)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    return tried


@pytest.mark.parametrize(
    "load",
    [
        lambda: folder_of("nobody/no-such-model", ("*.json",)),
        lambda: load_tokenizer("nobody/no-such-tokenizer"),
        lambda: HellaSwag("nobody/no-such-dataset", seq_len=8),
    ],
    ids=["model", "tokenizer", "dataset"],
)
def test_it_is_said_at_once(load: Callable[[], Any], asked: list[Any]) -> None:
    began = time.monotonic()
    with pytest.raises(AutofuncError, match=r"no network: huggingface\.co does not answer"):
        load()
    assert time.monotonic() - began < 20, "the libraries try again for 30 to 70 seconds"
    assert [host for host, _ in asked] == ["huggingface.co"] and not constants.HF_HUB_OFFLINE
