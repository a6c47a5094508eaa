"""The Hugging Face Hub: is a repository there, what does an error of it mean, may its code be run, how a folder is
pushed to it, and the model card of an adapter's folder, which says what was done, for a person and for the Hub.

The first is asked once and briefly: its clients ask six times, for each file of a repository.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, ModelCard, ModelCardData, constants, try_to_load_from_cache
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
"""Handed on to child processes, such as the runs of a comparison."""
CARD = "README.md"
NO_PICKLES = "its pytorch_model.bin holds more than weights, and torch does not run it; take a copy in safetensors"
"""Why a model is refused whose file of weights would run code."""

_LOADING = """A LoRA adapter that was made with pedyra, and that loads without it:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base, "this/folder")  # base: the base model named below
```
"""


def trust_remote_code() -> None:
    """Let this process and its children run code that a repository carries: the option --trust-remote-code.

    No file says so: recipes and run folders come from others.
    """
    os.environ[_TRUST] = "1"


def trusts_remote_code() -> bool:
    """Whether `trust_remote_code` was called. Never None, for which transformers asks on stdin."""
    return os.environ.get(_TRUST) == "1"


def why_not_on_hub(name: str, kind: Literal["model", "dataset"], revision: str | None = None) -> str | None:
    """Why the Hub will not give the repository `name`, in words, or None if it may.

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
    """Why offline mode (HF_HUB_OFFLINE) will not give the repository, in words: no cache has it. None outside of it."""
    if not _is_offline(kind) or _is_cached(name, kind, None):
        return None
    return "HF_HUB_OFFLINE is set, and no cache has it"


def told_by_hub(error: Exception) -> str:
    """What a library's error on reading from the Hub says, in one line, with the way in where a login is what lacks."""
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


def made_repository(repo_id: str, *, private: bool | None = None, token: str | bool | None = None) -> str:
    """Make the model repository where it is not there yet, and return its whole name; of `name` alone the Hub makes
    it under the name of the user whose token it is.

    Raises:
        ValueError: the Hub cannot be asked, or says no, in words.
    """
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"HF_HUB_OFFLINE is set, so nothing can be pushed to {repo_id}; unset it, or do not push")
    try:
        return HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id
    except Exception as error:  # the errors of a connection have changed their class with the client's library
        raise ValueError(_not_pushed(repo_id, error)) from error


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    path_in_repo: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    message: str = "Upload a LoRA adapter by pedyra",
) -> str:
    """Push a folder to a model repository, which is made where it is not there yet, and return the address of it.

    Args:
        path_in_repo: where in the repository; by default at its top.
        private: of a repository that is made.
        token: by default the one of `hf auth login` or HF_TOKEN.
        revision: the branch, which is made where it is not there yet.

    Raises:
        ValueError: the Hub says no, in words.
    """
    name = made_repository(repo_id, private=private, token=token)
    api = HfApi(token=token)
    try:
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=name, folder_path=folder, path_in_repo=path_in_repo, revision=revision, commit_message=message
        )
    except Exception as error:
        raise ValueError(_not_pushed(name, error)) from error
    return f"{constants.ENDPOINT}/{name}"


def _not_pushed(name: str, error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    login = status in (401, 403) or "token" in str(error).lower()
    repair = "; log in with `hf auth login`, or set HF_TOKEN to a token that may write" if login else ""
    return f"{name} cannot be pushed to on the Hub: {told_by_hub(error)}{repair}"


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
    """Of a data set's name what its folder in the cache keeps: capitals become small ones after an underscore there."""
    return re.sub("[^a-z0-9]", "", name.lower())


def adapter_card(
    title: str,
    rows: Mapping[str, str],
    *,
    text: str = "",
    base: str | None = None,
    dataset: str | None = None,
    metrics: Sequence[str] = (),
) -> str:
    """The card as Markdown, with the Hub's metadata on top.

    Args:
        rows: what was done, as name -> value; an empty value is left out.
        text: more of it, in Markdown, below them.
        base: the base model, and `dataset` the data, of which only a name of the Hub goes into the metadata.
    """
    data = ModelCardData(
        base_model=base if names_repository(base) else None,
        datasets=[dataset] if dataset is not None and names_repository(dataset) else None,
        library_name="peft",
        metrics=list(metrics) or None,
        tags=["pedyra", "lora"],
    )
    table = [f"| {name} | {' '.join(told.split()).replace('|', ' ')} |" for name, told in rows.items() if told]
    body = "\n".join([f"# {title}", "", _LOADING, "| | |", "| --- | --- |", *table, *(["", text] if text else []), ""])
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


def names_repository(name: str | None) -> bool:
    """Whether this is the name of a repository as the Hub has them, owner/name, and no path of this machine."""
    if name is None or name.startswith((".", "/", "~")) or Path(name).exists():
        return False
    return name.count("/") == 1 and "\\" not in name


def shown_name(name: str | None) -> str:
    """A base model's name as others may read it: of a path of this machine only the last part."""
    if not name:
        return ""
    return name if names_repository(name) else Path(name).name


def shown_ranks(ranks: Sequence[int]) -> str:
    """The ranks of an adapter's layers in one line."""
    if not ranks:
        return ""
    low, high = min(ranks), max(ranks)
    each = f"rank {low}" if low == high else f"ranks {low} to {high}"
    return f"{len(ranks)} layers of {each}, {sum(ranks)} in total"
