"""SIGINT (Ctrl-C) calls a function, because a finalizer or a library may swallow an exception."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def on_interrupt(act: Callable[[], None], *, also: Sequence[signal.Signals] = ()) -> Iterator[None]:
    """Call `act` at every SIGINT, or signal of `also`, inside the block, and raise nothing. Outside of the main thread,
    where Python allows no signal handler, do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: act()) for number in (signal.SIGINT, *also)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
