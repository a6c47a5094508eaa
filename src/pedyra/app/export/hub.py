"""What is read from the Hugging Face Hub: is a repository there, what does an error of it mean, may its code be run.

The first is asked once and briefly: its clients ask six times, for each file of a repository.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Literal

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

PATIENCE = 10.0
"""The Hub has so many seconds for its answer."""
_TRUST = "PEDYRA_TRUST_REMOTE_CODE"
"""Handed on to child processes, such as the runs of a comparison."""


def trust_remote_code() -> None:
    """Let this process and its children run code that a repository carries: the option --trust-remote-code.

    No file says so: recipes and run folders come from others.
    """
    os.environ[_TRUST] = "1"


def trusts_remote_code() -> bool:
    """Tell whether `trust_remote_code` was called. It is never None, for which transformers asks on stdin."""
    return os.environ.get(_TRUST) == "1"


def why_not_on_hub(name: str, kind: Literal["model", "dataset"], revision: str | None = None) -> str | None:
    """Say in words why the Hub will not give the repository `name`, or None if it may.

    What is in a cache already, and everything in offline mode (HF_HUB_OFFLINE), is left to the libraries that read it.
    """
    if _is_offline(kind) or _is_cached(name, kind, revision):
        return None
    try:
        HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=PATIENCE)
    except HFValidationError:
        return "it is not a valid name of a Hub repository"
    except GatedRepoError:
        return None  # who wants its files says how to ask for them
    except RevisionNotFoundError:
        return f"the Hub has no revision {revision!r} of it"
    except RepositoryNotFoundError:
        return "the Hub has none of this name that you may read"
    except HfHubHTTPError:
        return None  # it answers; what it says of the files themselves is told better by the library that wants them
    except Exception as error:  # the errors of a connection have changed their class with the client's library
        return f"the Hub cannot be reached ({' '.join(str(error).split()) or type(error).__name__})"
    return None


def why_not_offline(name: str, kind: Literal["model", "dataset"]) -> str | None:
    """Say why offline mode (HF_HUB_OFFLINE) will not give the repository: no cache has it. None outside of it."""
    if not _is_offline(kind) or _is_cached(name, kind, None):
        return None
    return "HF_HUB_OFFLINE is set, and no cache has it"


def told_by_hub(error: Exception) -> str:
    """Tell a library's error on reading from the Hub in one line, with the way in where a login is what lacks."""
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    whole = " ".join(part for part in (str(error), str(error.__cause__ or ""))).lower()
    if isinstance(error, GatedRepoError) or isinstance(error.__cause__, GatedRepoError) or "gated" in whole:
        return (
            f"{said} Its authors ask you to accept their terms: do so on its page at https://huggingface.co, then log "
            f"in with `hf auth login` (or set HF_TOKEN), or give the path of a copy that you have"
        )
    if "trust_remote_code" in whole:
        return "its repository carries code of its own; if you trust its authors, run that with --trust-remote-code"
    return said


def why_not_loaded(error: Exception) -> str:
    """Tell in one line why transformers could not load a model or a tokenizer."""
    if isinstance(error, UnpicklingError):
        return "its pytorch_model.bin holds more than weights, and torch does not run it; take a copy in safetensors"
    if "ignore_mismatched_sizes" in str(error):  # which points at a report that is not shown
        return (
            "its weights are of other sizes than its config and the task say, such as a head of another number of "
            "classes; save it without its head first"
        )
    return f"{told_by_hub(error)} ({type(error).__name__})"


def _is_offline(kind: str) -> bool:
    return constants.HF_HUB_OFFLINE or (kind == "dataset" and os.environ.get("HF_DATASETS_OFFLINE", "0") != "0")


def _is_cached(name: str, kind: str, revision: str | None) -> bool:
    if kind == "model":
        try:
            return isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)
        except HFValidationError:
            return False
    home = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    return home.is_dir() and any(_plain(folder.name) == _plain(name) for folder in home.iterdir())


def _plain(name: str) -> str:
    """Keep of a data set's name what its folder in the cache has: capitals are small there, after an underscore."""
    return re.sub("[^a-z0-9]", "", name.lower())
