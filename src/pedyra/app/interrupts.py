"""SIGINT (Ctrl-C) as something that has happened, not as an exception, which a finalizer or a library may drop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def on_interrupt(act: Callable[[], None], *, also: Sequence[signal.Signals] = ()) -> Iterator[None]:
    """While entered, every SIGINT calls `act`, in the main thread, and raises nothing. Ignoring it ends.

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
