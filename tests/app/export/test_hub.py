"""The Hub is asked once for a repository, and not at all for what a cache has; its answer becomes words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from pedyra.app.export.hub import told_by_hub, why_not_on_hub


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Let the Hub answer with an error, or None; the list of what it was asked."""
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))

    def answer(error: Exception | None) -> list[tuple[Any, ...]]:
        def repo_info(self: HfApi, name: str, *, repo_type: str, revision: str | None, timeout: float) -> None:
            asked.append((name, repo_type, revision))
            if error is not None:
                raise error

        monkeypatch.setattr(HfApi, "repo_info", repo_info)
        return asked

    return answer


def http(kind: type[HfHubHTTPError]) -> HfHubHTTPError:
    return kind.__new__(kind)  # what they are made of differs with the client's version


def test_what_is_there_is_left_to_who_reads_it(answers):
    asked = answers(None)
    assert why_not_on_hub("owner/model", "model", "v2") is None
    assert asked == [("owner/model", "model", "v2")]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (http(RepositoryNotFoundError), "the Hub has none of this name that you may read"),
        (http(RevisionNotFoundError), "the Hub has no revision 'v2' of it"),
        (http(HfHubHTTPError), None),
        (http(GatedRepoError), None),
        (OSError("Name or service\nnot known"), "the Hub cannot be reached (Name or service not known)"),
        (TimeoutError(), "the Hub cannot be reached (TimeoutError)"),
    ],
)
def test_what_is_not_there_is_told(answers, error: Exception, reason: str | None):
    answers(error)
    assert why_not_on_hub("owner/model", "model", "v2") == reason


def test_a_cache_and_offline_mode_ask_nothing(answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = answers(OSError("no network"))
    for folder in ("owner___data", "Open-Orca___open_orca"):  # as datasets names them
        (tmp_path / folder).mkdir()
    assert why_not_on_hub("owner/data", "dataset") is why_not_on_hub("Open-Orca/OpenOrca", "dataset") is None
    with monkeypatch.context() as patched:
        patched.setenv("HF_DATASETS_OFFLINE", "1")
        assert why_not_on_hub("owner/other", "dataset") is None
    monkeypatch.setattr(
        "pedyra.app.export.hub.try_to_load_from_cache", lambda name, file, revision: f"/cache/{name}/{file}"
    )
    assert why_not_on_hub("owner/model", "model") is None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert why_not_on_hub("owner/other", "dataset") is None
    assert asked == []


def test_a_gated_repository_comes_with_the_way_in():
    told = told_by_hub(OSError("You are trying to access a gated repo.\nMake sure to have access to it."))
    assert told.startswith("You are trying to access a gated repo. Its authors ask you to accept their terms")
    assert "`hf auth login`" in told and "the path of a copy" in told and "\n" not in told
    assert told_by_hub(ValueError("no file\nand more")) == "no file"
