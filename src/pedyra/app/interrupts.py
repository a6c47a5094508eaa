"""SIGINT (Ctrl-C) calls a function here; an exception would be dropped by a finalizer or a library."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def on_interrupt(act: Callable[[], None], *, also: Sequence[signal.Signals] = ()) -> Iterator[None]:
    """Let every SIGINT call `act` while entered, in the main thread, and raise nothing.

    Entered in another thread, where Python allows no signal handler, it does nothing. `also`: other signals that mean
    the same, as SIGTERM does to a process whose children would outlive it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: act()) for number in (signal.SIGINT, *also)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
