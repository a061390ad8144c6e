"""Folders of models that are named as on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from autofunc.errors import ModelError, in_brief, one_of
from autofunc.hub_access import cache_without_network
from autofunc.shown import quoted

CONFIGS = ("*.json", "*.py")
WEIGHTS = (*CONFIGS, "*.safetensors")


def folder_of(name: str, patterns: tuple[str, ...], revision: str | None = None) -> Path:
    """Where the files of a model are: in the local cache, after a download when that is allowed (HF_HUB_OFFLINE).

    Args:
        name: `organisation/model`, as on the hub.
        patterns: of the files that are needed.
        revision: a branch, tag or commit.

    Raises:
        ModelError: when it is neither a folder nor a model that can be had.
    """
    from huggingface_hub import snapshot_download

    with cache_without_network() as network:
        try:
            return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
        except Exception as error:  # offline, no such name, no access: each is an error of its own
            first = in_brief(error).partition("\n")[0]
            why = network or f" ({first})"
            raise ModelError(
                f"{quoted(name)} is neither a folder nor a model in the Hugging Face cache, and cannot be downloaded"
                f"{why}; {_of_cached(name)}"
            ) from error


def _of_cached(name: str) -> str:
    known = _cached()
    return f"cached models: {one_of(name, known)}" if known else "no model is cached"


def _cached() -> list[str]:
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return sorted(repo.repo_id for repo in scan_cache_dir(constants.HF_HUB_CACHE).repos if repo.repo_type == "model")
    except CacheNotFound:
        return []
