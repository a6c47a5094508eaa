"""Is it on the Hugging Face Hub? Asked once and briefly: its clients ask six times, for each file of a repository."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

PATIENCE = 10.0
"""Seconds that the Hub has for its answer."""


def why_not_on_hub(name: str, kind: Literal["model", "dataset"], revision: str | None = None) -> str | None:
    """Why the Hub will not give the repository `name`, in words, or None if it may.

    What is in a cache already, and everything in offline mode (HF_HUB_OFFLINE), is left to the libraries that read it.
    """
    if constants.HF_HUB_OFFLINE or _is_cached(name, kind, revision):
        return None
    try:
        HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=PATIENCE)
    except HFValidationError:
        return "it is no name that the Hub could have"
    except RevisionNotFoundError:
        return f"the Hub has no revision {revision!r} of it"
    except RepositoryNotFoundError:
        return "the Hub has none of this name that you may read"
    except HfHubHTTPError:
        return None  # it answers; what it says of the files themselves is told better by the library that wants them
    except Exception as error:  # the errors of a connection have changed their class with the client's library
        return f"the Hub cannot be reached ({' '.join(str(error).split()) or type(error).__name__})"
    return None


def _is_cached(name: str, kind: str, revision: str | None) -> bool:
    if kind == "model":
        try:
            return isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)
        except HFValidationError:
            return False
    home = os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets"
    return (Path(home) / name.replace("/", "___")).is_dir()
