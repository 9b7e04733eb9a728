"""Clients that mean no good, with raw sockets: heads and bodies that never end, readers that do not read, connections without number."""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
from chat_tokenizer import save_tokenizer
from serve_fake import FakeEngine, Server

from miniinfer.engine.text import Tokenizer
from miniinfer.serve import server as hardened
from miniinfer.serve import service

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def connect(server: Server, receive_buffer: int | None = None) -> socket.socket:
    sock = socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.settimeout(20)
    sock.connect(("127.0.0.1", server.port))
    return sock


def closed_after(sock: socket.socket) -> float:
    """Seconds until the server lets go of a connection; what it still sends is dropped."""
    begin = time.monotonic()
    try:
        while sock.recv(65536):
            pass
    except ConnectionError:
        pass
    return time.monotonic() - begin


def well(server: Server) -> bool:
    """Is a neighbour served."""
    sock = connect(server)
    sock.sendall(b"GET /live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    answer = b""
    while part := sock.recv(65536):
        answer += part
    return answer.startswith(b"HTTP/1.1 200")


def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


@pytest.mark.parametrize("said", [b"", b"POST /v1/comp", HEAD, b"\r\n"])
def test_a_head_that_never_ends_is_given_up(said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardened, "HEAD_SECONDS", 0.5)
    with Server(FakeEngine(None)) as server:
        sock = connect(server)
        sock.sendall(said)
        assert 0.2 < closed_after(sock) < 5
        assert well(server)


def test_blank_lines_between_requests_are_no_way_to_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardened, "HEAD_SECONDS", 0.5)
    with Server(FakeEngine(None)) as server:
        sock = connect(server)
        sock.sendall(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n")
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")
        time.sleep(0.1)
        sock.sendall(b"\r\n")  # ends the time for which an idle connection is kept
        assert closed_after(sock) < 5


def test_a_trickled_head_gets_no_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardened, "HEAD_SECONDS", 0.5)
    with Server(FakeEngine(None)) as server:
        sock = connect(server)
        begin = time.monotonic()
        with pytest.raises(ConnectionError):
            for byte in HEAD * 100:
                sock.sendall(bytes([byte]))
                time.sleep(0.02)
        assert time.monotonic() - begin < 5


def test_many_headers_are_not_even_parsed() -> None:
    """Each would cost a call, and everybody else its time."""
    with Server(FakeEngine(None)) as server:
        for lines, status in ((200, b"200"), (300, b"431")):
            with contextlib.closing(connect(server)) as sock:
                sock.sendall(b"GET /live HTTP/1.1\r\nhost: x\r\n" + b"x: y\r\n" * lines + b"\r\n")
                assert sock.recv(100)[9:12] == status
        with contextlib.closing(connect(server)) as sock:  # lines of a body are not a head's, even if it is answered before it has come
            body = b"[\n" + b"\n" * 5000 + b"]"
            sock.sendall(b"POST /nowhere HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body))
            assert sock.recv(12) == b"HTTP/1.1 404"
            sock.sendall(body + b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n")
            answers = b""
            while b"HTTP/1.1 200" not in answers:
                answers += (part := sock.recv(1000))
                assert part and b"HTTP/1.1 431" not in answers


def test_a_flood_of_headers_is_refused() -> None:
    with Server(FakeEngine(None)) as server:
        for flood in (b"x: " + b"y" * (1 << 20), b"x: y\r\n" * 200_000, b"\t" * (1 << 20)):
            sock = connect(server)
            try:
                sock.sendall(HEAD + flood)
                assert sock.recv(100)[:12] in (b"HTTP/1.1 431", b"HTTP/1.1 400")
            except ConnectionError:
                pass  # it was closed while we were still sending
        assert well(server)


def test_a_trickled_body_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_BODY_SECONDS", 0.5)
    with Server(FakeEngine(None)) as server:
        sock = connect(server)
        sock.sendall(HEAD + b"content-length: 1000\r\n\r\n{")
        assert sock.recv(100).startswith(b"HTTP/1.1 408")
        assert closed_after(sock) < 5 and well(server)


def test_bodies_are_bounded_whether_their_length_is_told_or_not() -> None:
    with Server(FakeEngine(None), max_body_mib=1) as server:
        sock = connect(server)
        sock.sendall(HEAD + b"content-length: 99999999999\r\n\r\n{")
        assert sock.recv(100).startswith(b"HTTP/1.1 413")
        sock = connect(server)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        chunk = b"%x\r\n%s\r\n" % (1 << 16, b" " * (1 << 16))
        sock.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        try:
            for _ in range(1600):  # 100 MiB
                sock.sendall(chunk)
            assert sock.recv(100).startswith(b"HTTP/1.1 413")
        except ConnectionError:
            pass
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10
        assert well(server)


def test_a_reader_that_does_not_read_is_given_up_and_its_request_aborted(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardened, "STALL_SECONDS", 0.5)
    engine = FakeEngine(tokenizer, lambda prompt: "many words without end " * 20_000, max_model_len=1 << 20)
    with Server(engine) as server:
        sock = connect(server, 4096)
        body = json.dumps({"prompt": "x", "max_tokens": 400_000, "stream": True}).encode()
        sock.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
        assert sock.recv(100).startswith(b"HTTP/1.1 200")
        until(lambda: engine.open)
        until(lambda: not engine.open, 15)  # never read again
        assert engine.aborted and server.api.gate.admission.requests == 0
        assert well(server)
        sock.close()


def test_the_connection_idle_longest_makes_room(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer, lambda prompt: "word " * 60)
    engine.delay = 0.02
    with Server(engine, max_connections=20) as server:
        busy = connect(server)
        body = json.dumps({"prompt": "x", "max_tokens": 200, "stream": True}).encode()
        busy.sendall(HEAD + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        until(lambda: engine.open)
        idle = [connect(server) for _ in range(100)]
        assert well(server) and len(server.uvicorn.server_state.connections) <= 21
        assert closed_after(idle[0]) < 2
        answer = b""
        while part := busy.recv(65536):
            answer += part
        assert answer.endswith(b"0\r\n\r\n") and b"[DONE]" in answer  # who works is not idle
        for sock in idle:
            sock.close()


def test_half_open_connections_are_probed() -> None:
    with Server(FakeEngine(None)) as server:
        sock = connect(server)
        until(lambda: server.uvicorn.server_state.connections)
        (connection,) = server.uvicorn.server_state.connections
        theirs = connection.transport.get_extra_info("socket")  # type: ignore[union-attr]
        assert theirs.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        sock.close()


def test_neighbours_are_served_beside_many_slow_ones(tokenizer: Tokenizer) -> None:
    """500 connections that trickle their heads, and 50 readers that do not read."""
    engine = FakeEngine(tokenizer, lambda prompt: "many words without end " * 2_000, max_model_len=1 << 20)
    with Server(engine) as server:
        slow = [connect(server) for _ in range(500)]
        for sock in slow:
            sock.sendall(HEAD)
        body = json.dumps({"prompt": "x", "max_tokens": 9_000, "stream": True}).encode()
        stalled = [connect(server, 4096) for _ in range(50)]
        for sock in stalled:
            sock.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
        times = []
        for _ in range(50):
            begin = time.monotonic()
            assert well(server)
            times.append(time.monotonic() - begin)
        assert sorted(times)[25] < 1.0
        for sock in slow + stalled:
            sock.close()
