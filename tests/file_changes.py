"""Changes in a folder, one by one: what if the process dies before the next one, or the disk is full?"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")
_KILLED = 77
_watchers: list[Callable[[str, str], None]] = []


def _told(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watchers or event not in _CHANGES:
        return
    if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return  # only read
    for watcher in _watchers:
        watcher(event, str(arguments[0]))


sys.addaudithook(_told)  # of the interpreter: what torch and safetensors write by themselves comes between two of these


@contextmanager
def from_change(point: int, folder: Path, act: Callable[[str], Any]) -> Iterator[list[str]]:
    """`act(event)` before the `point`-th change in `folder` and each that follows; the list has what they were."""
    left, seen = [point], []

    def count(event: str, path: str) -> None:
        if str(folder) in path:
            left[0] -= 1
            if left[0] <= 0:
                seen.append(f"{event} {path}")
                act(event)

    _watchers.append(count)
    try:
        yield seen
    finally:
        _watchers.remove(count)


def killed_at(point: int, folder: Path, act: Callable[[], Any]) -> bool:
    """Run `act` in a child process that ends before its `point`-th change in `folder`; whether it came as far."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork with threads; none of them is used
        child = os.fork()
    if child == 0:
        try:
            with from_change(point, folder, lambda event: os._exit(_KILLED)):
                act()
                os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, _KILLED)
    return code == _KILLED
