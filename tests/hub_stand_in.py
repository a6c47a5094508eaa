"""A Hub that keeps what is pushed to it, in place of huggingface_hub's HfApi."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any


class HubStandIn:
    """`install` it in place of HfApi; `files` is then what was pushed, path in the repository -> bytes."""

    def __init__(self, refuses: Exception | None = None) -> None:
        self.refuses = refuses
        self.repositories: dict[str, Any] = {}
        self.branches: list[str] = []
        self.files: dict[str, bytes] = {}
        self.tokens: list[Any] = []

    def install(self, monkeypatch: Any) -> HubStandIn:
        monkeypatch.setattr("pedyra.lora.card.HfApi", self._api)
        return self

    def _api(self, *, token: Any = None) -> HubStandIn:
        self.tokens.append(token)
        return self

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> Any:
        if self.refuses is not None:
            raise self.refuses
        name = repo_id if "/" in repo_id else f"somebody/{repo_id}"
        assert exist_ok or name not in self.repositories
        self.repositories[name] = private
        return SimpleNamespace(repo_id=name)

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
        assert repo_id in self.repositories and exist_ok
        self.branches.append(branch)

    def upload_folder(self, *, repo_id: str, folder_path: Any, revision: str | None, commit_message: str) -> None:
        assert repo_id in self.repositories and commit_message
        assert revision is None or revision in self.branches
        for path in Path(folder_path).rglob("*"):
            if path.is_file():
                self.files[path.relative_to(folder_path).as_posix()] = path.read_bytes()
