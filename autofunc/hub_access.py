"""The Hugging Face hub without a network: fail at once if a file is not cached, not after minutes of retries."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

_ANSWER_SECONDS = 3.0


@contextmanager
def cache_without_network() -> Iterator[str]:
    """Make the hub's libraries use only their caches during the block if the hub does not answer.

    Yields:
        A remark on the network for errors, in brackets; empty if nothing is known to be wrong.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield " (HF_HUB_OFFLINE is set)"
        return
    host = urlsplit(constants.ENDPOINT).hostname or ""
    if getproxies() or _answers(host, urlsplit(constants.ENDPOINT).port or 443):
        yield ""
        return
    # the libraries read the environment variable only on import
    places: list[Any] = [place for place in (constants, sys.modules.get("datasets.config")) if place is not None]
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = True
    try:
        yield f" (no network: {host} does not answer)"
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=_ANSWER_SECONDS):
            return True
    except OSError:
        return False
