"""Clients that mean harm, each in a process of its own, and what a well-behaved one sees beside them.

python tests/attackers.py NAME PORT    attacks until it is killed
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from serve_process import raw_request


def connect(port: int) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(20)
    sock.connect(("127.0.0.1", port))
    return sock


def trickled_heads(port: int) -> None:
    socks = [connect(port) for _ in range(300)]
    for byte in itertools.cycle(b"GET /live HTTP/1.1\r\nx: y\r\n"):
        time.sleep(1.0)
        for i, sock in enumerate(socks):
            try:
                sock.sendall(bytes([byte]))
            except OSError:  # its time was over
                socks[i] = connect(port)


def unread_answers(port: int) -> None:
    """Streams that have ended long since, but for the client that takes none of it."""
    socks = [connect(port) for _ in range(50)]
    for i, sock in enumerate(socks):
        fields = {"model": "bundled", "prompt": f"Number {i}: once upon a time", "max_tokens": 10, "ignore_eos": True, "stream": True}
        sock.sendall(raw_request(fields))
    time.sleep(3600)


def header_floods(port: int) -> None:
    while True:
        time.sleep(0.2)
        with contextlib.suppress(OSError), connect(port) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 20_000)


def large_bodies(port: int) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    while True:
        time.sleep(0.2)
        with contextlib.suppress(OSError), connect(port) as sock:
            sock.sendall(head + b"content-length: 999999999\r\n\r\n" + b"x" * 100_000)


ATTACKS: dict[str, Callable[[int], None]] = {f.__name__: f for f in (trickled_heads, unread_answers, header_floods, large_bodies)}


@contextlib.contextmanager
def attacked(port: int, name: str) -> Iterator[None]:
    """While an attack goes on. Its process gives way to ours: in earnest it would be on another machine."""
    process = subprocess.Popen([sys.executable, __file__, name, str(port)], preexec_fn=lambda: os.nice(19))
    try:
        time.sleep(1.5)
        yield
        assert process.poll() is None, f"{name} ended with {process.returncode}"
    finally:
        process.kill()
        process.wait()


def latencies(port: int, samples: int) -> list[float]:
    """Of one neighbour's requests of four tokens, one after the other; milliseconds, in order of size."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body, found = json.dumps({"model": "bundled", "prompt": "Hello", "max_tokens": 4, "temperature": 0}), []
    for _ in range(samples):
        begin = time.monotonic()
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        response = connection.getresponse()
        assert response.read() and response.status == 200
        found.append(1e3 * (time.monotonic() - begin))
    connection.close()
    return sorted(found)


if __name__ == "__main__":
    ATTACKS[sys.argv[1]](int(sys.argv[2]))
