"""A Ctrl-C is acted on, also where an exception would be lost."""

from __future__ import annotations

import os
import signal

import pytest

from pedyra.app.interrupts import on_interrupt


class Finalized:
    """Ctrl-C arrives while this is taken away."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


@pytest.fixture(params=[signal.SIG_IGN, signal.default_int_handler])
def inherited(request):
    """What the process does on SIGINT at first; as it was, afterwards."""
    before = signal.signal(signal.SIGINT, request.param)
    yield request.param
    assert signal.getsignal(signal.SIGINT) == request.param
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("inherited")
def test_inside_a_finalizer_too_it_is_acted_on():
    came = []
    with on_interrupt(lambda: came.append(1)):
        Finalized()
        os.kill(os.getpid(), signal.SIGINT)
    assert came == [1, 1]


def test_another_signal_may_mean_the_same_and_is_given_back():
    came, before = [], signal.getsignal(signal.SIGTERM)
    with on_interrupt(lambda: came.append(1), also=[signal.SIGTERM]):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert came == [1, 1] and signal.getsignal(signal.SIGTERM) == before
