"""The Hub is asked once for a repository, and not at all for what a cache has; its answer becomes words."""

from __future__ import annotations

from typing import Any

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from pedyra.export import hub
from pedyra.export.hub import why_not_on_hub


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch):
    """Let the Hub answer with an error, or None; the list of what it was asked."""
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

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


def test_a_cache_and_offline_mode_ask_nothing(answers, monkeypatch: pytest.MonkeyPatch):
    asked = answers(OSError("no network"))
    with monkeypatch.context() as patched:
        patched.setattr(hub, "try_to_load_from_cache", lambda name, file, **which: f"/cache/{name}/{file}")
        assert why_not_on_hub("owner/model", "model") is why_not_on_hub("owner/data", "dataset") is None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert why_not_on_hub("owner/other", "dataset") is None
    assert asked == []
