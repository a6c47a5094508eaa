"""The benchmarks, called as their command lines are."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.command import command_line


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a benchmark with these arguments: its exit code, and what it printed on stdout and stderr."""

    def called(command: Callable[..., None], *arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            command_line(command, list(arguments))
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return called
