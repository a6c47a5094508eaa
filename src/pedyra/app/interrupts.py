"""SIGINT (Ctrl-C) as something that has happened, not only as an exception, which gets lost.

Python drops a KeyboardInterrupt that is raised inside a finalizer or a callback of the garbage collector, some
libraries swallow one while they are imported, and a process that a script started in the background ignores SIGINT.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

_earlier = False
"""Whether a SIGINT came while `remembered` was entered."""


@contextmanager
def remembered() -> Iterator[None]:
    """While entered, a SIGINT raises KeyboardInterrupt as usual; where that is lost, `on_interrupt` knows of it.

    Ends the inherited state in which the process would not get it, as a script's background process ignores it.
    """
    global _earlier
    if not _in_main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, _remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
        _earlier = False


@contextmanager
def on_interrupt(act: Callable[[], None], *, also: Sequence[signal.Signals] = ()) -> Iterator[None]:
    """While entered, every SIGINT calls `act`, in the main thread, and raises nothing. Ignoring it ends.

    One that came before, but ended nothing, counts as the first. Entered in another thread, where Python allows no
    signal handler, it does nothing. `also`: other signals that mean the same, as SIGTERM does to a process whose
    children would outlive it.
    """
    if not _in_main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: act()) for number in (signal.SIGINT, *also)}
    try:
        if _earlier:
            act()
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _remember(signum: int, frame: FrameType | None) -> None:
    global _earlier
    _earlier = True
    signal.default_int_handler(signum, frame)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
