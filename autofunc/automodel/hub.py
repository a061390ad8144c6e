"""Folders of models by their names on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from autofunc.errors import ModelError, in_brief, one_of
from autofunc.hub_access import cache_without_network
from autofunc.shown import quoted

CONFIGS = ("*.json", "*.py")
WEIGHTS = (*CONFIGS, "*.safetensors")


def folder_of(name: str, patterns: tuple[str, ...], revision: str | None = None) -> Path:
    """Return the folder of a model in the local cache, downloading it first unless HF_HUB_OFFLINE is set.

    Args:
        name: `organisation/model`, as on the hub.
        patterns: of the files needed.
        revision: a branch, tag or commit.

    Raises:
        ModelError: if it is neither in the cache nor can be downloaded.
    """
    from huggingface_hub import snapshot_download

    with cache_without_network() as network:
        try:
            return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
        except Exception as error:  # offline, no such name, no access: each raises a different error
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
