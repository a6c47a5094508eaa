"""A Ray cluster that does not answer is told within ten seconds, by its address, before anything else is done."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pedyra.compare.ray_address import check_ray_address

COMPARE_SMOKE = Path(__file__).parents[2] / "recipes" / "compare_smoke.yaml"
HELLO = b"\0\0\0\4\0\0\0\0\0"
"""An empty SETTINGS frame: what any HTTP/2 server says first."""


def frame(payload: bytes) -> bytes:
    """HEADERS, on stream 1."""
    return len(payload).to_bytes(3, "big") + b"\1\4\0\0\0\1" + payload


@pytest.fixture
def listening():
    """A port that accepts connections, and never answers by itself."""
    server = socket.create_server(("127.0.0.1", 0))
    yield server
    server.close()


def address_of(server: socket.socket) -> str:
    return f"127.0.0.1:{server.getsockname()[1]}"


def compare_at(address: str) -> tuple[int, str, float]:
    """Exit code, what is told, and the seconds of the whole command."""
    started = time.monotonic()
    command = [sys.executable, "-m", "pedyra", "compare", str(COMPARE_SMOKE), "--ray", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr, time.monotonic() - started


def test_the_whole_command_ends_within_ten_seconds_where_nothing_ever_answers(listening):
    code, told, seconds = compare_at(f"ray://{address_of(listening)}")
    assert code == 2 and f"--ray ray://{address_of(listening)} does not answer (no answer within 5 s)" in told
    assert seconds < 10


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_port_on_which_nobody_listens_is_told_at_once(scheme: str):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        started = time.monotonic()
        with pytest.raises(ValueError, match=f"--ray {scheme}{address_of(bound)} does not answer"):
            check_ray_address(scheme + address_of(bound))
        assert time.monotonic() - started < 2


def test_a_name_that_is_looked_up_for_ever_is_told_in_time(monkeypatch):
    over = threading.Event()

    def look_up(*_: object) -> list:
        over.wait(30)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"--ray head:6379 does not answer \(no answer within 0.2 s\)"):
        check_ray_address("head:6379", seconds=0.2)
    assert time.monotonic() - started < 2
    over.set()


@pytest.mark.parametrize("address", ["nowhere", "host:port", ":6379", "ray://"])
def test_what_is_no_address_is_refused(address: str):
    with pytest.raises(ValueError, match="is no address; it is host:port, ray://host:port, auto or local"):
        check_ray_address(address)


@pytest.mark.parametrize(
    ("answer", "flaw"),
    [
        (HELLO + frame(b"\x88\x5f"), None),  # :status 200
        (HELLO + frame(b"\x20\x88\x5f"), None),  # the same, after the size of a table
        (HELLO + frame(b"\x08\x03502"), "does not speak Ray's protocol"),  # a proxy whose server is gone
        (HELLO, "no answer within 0.5 s"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "does not speak Ray's protocol"),
    ],
)
def test_only_a_server_that_answers_a_call_is_good_enough_to_go_on(listening, answer: bytes, flaw: str | None):
    over = threading.Event()

    def serve() -> None:
        connection, _ = listening.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(answer)
            over.wait(10)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        if flaw is None:
            check_ray_address(address_of(listening), seconds=5)
        else:
            with pytest.raises(ValueError, match=flaw):
                check_ray_address(address_of(listening), seconds=0.5)
    finally:
        over.set()
        thread.join()


@pytest.mark.skipif(importlib.util.find_spec("grpc") is None, reason="needs grpcio: pip install grpcio")
def test_a_grpc_server_that_knows_no_health_service_answers():
    from concurrent.futures import ThreadPoolExecutor

    import grpc

    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        check_ray_address(f"127.0.0.1:{port}")
        check_ray_address(f"ray://127.0.0.1:{port}")
    finally:
        server.stop(None).wait()
