"""The Hugging Face Hub is asked for a repository, its errors become words, and its code runs only on leave.

It is asked once and briefly, since its clients ask six times for each file of a repository.
"""

from __future__ import annotations

import os
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
"""Seconds that the Hub has for its answer."""
_TRUST = "PEDYRA_TRUST_REMOTE_CODE"
"""An environment variable, since child processes, such as the runs of a comparison, inherit it."""


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
    if constants.HF_HUB_OFFLINE or _is_cached(name, kind, revision):
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


def why_not_loaded(error: Exception) -> str:
    """Tell why a library could not read from the Hub or from a folder, where its own words are not the clearest."""
    if "trust_remote_code" in str(error):
        return "its repository carries code of its own; if you trust its authors, run that with --trust-remote-code"
    if "ignore_mismatched_sizes" in str(error):  # which points at a report that is not shown
        return (
            "its weights are of other sizes than its config and the task say, such as a head of another number of "
            "classes; save it without its head first"
        )
    return f"{error} ({type(error).__name__})"


def _is_cached(name: str, kind: str, revision: str | None) -> bool:
    file = "config.json" if kind == "model" else "README.md"
    try:
        return try_to_load_from_cache(name, file, revision=revision, repo_type=kind) is not None
    except HFValidationError:
        return False
