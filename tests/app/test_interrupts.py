"""A Ctrl-C is acted on, also where the exception that it raises is lost."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from pedyra.app.interrupts import on_interrupt, remembered


class Finalized:
    """Ctrl-C arrives while this is taken away."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


@pytest.fixture
def lose_interrupt(monkeypatch):
    """lose_interrupt(): a Ctrl-C whose KeyboardInterrupt Python drops."""

    def lose():
        lost = []
        with monkeypatch.context() as patch:
            patch.setattr(sys, "unraisablehook", lambda unraisable: lost.append(unraisable.exc_type))
            Finalized()
        assert lost == [KeyboardInterrupt]

    return lose


@pytest.fixture(params=[signal.SIG_IGN, signal.default_int_handler])
def inherited(request):
    """What the process does on SIGINT at first; as it was, afterwards."""
    before = signal.signal(signal.SIGINT, request.param)
    yield request.param
    assert signal.getsignal(signal.SIGINT) == request.param
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("inherited")
def test_one_that_was_lost_before_counts_as_the_first(lose_interrupt):
    came = []
    with remembered():
        lose_interrupt()
        with on_interrupt(lambda: came.append("lost")):
            assert came == ["lost"]
    with remembered(), on_interrupt(lambda: came.append("again")):
        assert came == ["lost"]  # it was of another command


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


@pytest.mark.usefixtures("inherited")
def test_otherwise_it_is_a_keyboard_interrupt():
    with pytest.raises(KeyboardInterrupt), remembered():
        signal.raise_signal(signal.SIGINT)
