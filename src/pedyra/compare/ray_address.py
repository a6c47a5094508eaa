"""Whether a Ray cluster answers at an address, told in seconds and before anything heavy is imported.

Ray's own attempts take a minute and more, also on a port that is closed.
"""

from __future__ import annotations

import os
import queue
import socket
import threading

ANSWER_SECONDS = 5.0
"""With the start of the interpreter, well below ten."""

_SETTINGS, _DATA, _HEADERS, _RESET, _GOAWAY = 4, 0, 1, 3, 7
"""Types of HTTP/2 frames (RFC 9113, 6)."""
_STATUS_200 = 0x88
"""First byte of a header block that begins with `:status 200` (RFC 7541, A)."""


def check_ray_address(address: str, seconds: float = ANSWER_SECONDS) -> None:
    """Raise ValueError, naming the address, unless something that speaks gRPC, as Ray does, answers in time.

    Args:
        address: host:port, ray://host:port; nothing is asked for "auto" and "local".
        seconds: for everything, the look-up of the name included.
    """
    if address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"--ray {address!r} is no address; it is host:port, ray://host:port, auto or local")
    found: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    # A look-up takes as long as it takes: it is left behind.
    threading.Thread(target=lambda: found.put(_flaw(host, int(port), seconds)), daemon=True).start()
    try:
        flaw = found.get(timeout=seconds)
    except queue.Empty:
        flaw = f"no answer within {seconds:g} s"
    if flaw is not None:
        raise ValueError(
            f"--ray {address} does not answer ({flaw}); start Ray there, or give the address of its head node"
        )


def _flaw(host: str, port: int, seconds: float) -> str | None:
    """Why no Ray cluster is there; None if one may be."""
    try:
        with socket.create_connection((host, port), timeout=seconds) as connection:
            if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
                return None
            connection.sendall(_question(f"{host}:{port}"))
            return None if _speaks_grpc(connection) else "it accepts connections, but does not speak Ray's protocol"
    except TimeoutError:
        return f"no answer within {seconds:g} s"
    except (OSError, UnicodeError) as error:  # a name that cannot be encoded
        return getattr(error, "strerror", None) or str(error)


def _question(authority: str) -> bytes:
    """A connection's beginning and one call of gRPC's health service; a server without the service answers too."""
    headers = b"".join(
        [
            b"\x83\x86",  # :method POST, :scheme http
            b"\x04" + _text("/grpc.health.v1.Health/Check"),
            b"\x01" + _text(authority),
            b"\x0f\x10" + _text("application/grpc"),  # content-type
            b"\x00" + _text("te") + _text("trailers"),
        ]
    )
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(_SETTINGS, 0, 0, b"")
    end_headers, end_stream = 4, 1
    return preface + _frame(_HEADERS, end_headers, 1, headers) + _frame(_DATA, end_stream, 1, bytes(5))


def _speaks_grpc(connection: socket.socket) -> bool:
    """Whether the answer to the call comes with status 200, as gRPC's always does, whatever it says."""
    with connection.makefile("rb") as stream:
        while len(head := stream.read(9)) == 9:
            length, kind = int.from_bytes(head[:3], "big"), head[3]
            if kind in (_RESET, _GOAWAY) or length > 1 << 14 or kind > 9:
                return False
            payload = stream.read(length)
            if kind == _HEADERS:
                table_size_updates = bytes(range(0x20, 0x40))
                return payload.lstrip(table_size_updates)[:1] == bytes([_STATUS_200])
    return False


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def _text(text: str) -> bytes:
    """A string of at most 254 bytes, not compressed; a name has no more than 253."""
    data = text.encode()[:254]
    return (bytes([len(data)]) if len(data) < 127 else bytes([127, len(data) - 127])) + data
