"""The HTTP server: uvicorn around our application, with a limit on heads, our way to stop, and a greeting.

Owns what of uvicorn is ours, and what the server prints. Its process, socket and signals are launch.py's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shlex
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from miniinfer.serve.app import build_app
from miniinfer.serve.fleet import Fleet, Member
from miniinfer.serve.metrics import log_throughput
from miniinfer.serve.prefixes import pin_files
from miniinfer.utils import get_logger

__all__ = ["Fleet", "Member", "Server", "Uvicorn", "greeting", "log_throughput", "pin_files", "uvicorn_config"]

log = get_logger(__name__)

DRAIN_SECONDS = 5.0  # how long a stopping server lets open requests go on
MAX_HEAD = 64 << 10  # bytes of a request line and its headers
MAX_LINES = 256  # of them; each costs the parser a call of Python
HEAD_SECONDS = 20.0  # from a connection, or a request's first byte, to the end of its headers
STALL_SECONDS = 60.0  # that a client may leave what it was sent unread before it is given up, and its request with it
KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}  # seconds, seconds, probes


def greeting(fleet: Fleet, listener: socket.socket) -> str:
    """Where the server is, its page, and a command that talks to it."""
    service, names = fleet.default, ", ".join(fleet.members)
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    tokenizer, url = service.engine.tokenizer, f"http{'s' if fleet.config.ssl_certfile else ''}://{host}:{port}/v1"
    body: dict[str, Any] = {"model": service.model}
    if tokenizer is None:
        path, body = "completions", body | {"prompt": [1, 2, 3]}
    elif "default" in tokenizer.chat_templates:
        path, body = "chat/completions", body | {"messages": [{"role": "user", "content": "Hello! What are you?"}]}
    else:
        path, body = "completions", body | {"prompt": "Once upon a time"}
    key = "" if not fleet.config.guarded else " -H 'Authorization: Bearer YOUR-KEY'"
    curl = f"curl {url}/{path} -H 'Content-Type: application/json'{key} -d {shlex.quote(json.dumps(body, ensure_ascii=False))}"
    page = url.removesuffix("v1")
    return f"{names} {'is' if len(fleet.members) == 1 else 'are'} ready at {url} and, in a browser, at {page} (Ctrl+C stops it). Try:\n  {curl}"


def uvicorn_config(fleet: Fleet) -> uvicorn.Config:
    """How uvicorn runs our application; its log has our handlers, and only errors to tell."""
    return uvicorn.Config(
        build_app(fleet),
        port=0,  # of no effect where the socket is given
        http=type("Protocol", (_Protocol,), {"most": fleet.config.max_connections}),
        ws="none",
        lifespan="auto",
        log_config=None,
        access_log=False,
        server_header=False,
        ssl_certfile=fleet.config.ssl_certfile,
        ssl_keyfile=fleet.config.ssl_keyfile,
        timeout_keep_alive=65,  # longer than the 60 s after which common proxies let go of an idle connection
        timeout_graceful_shutdown=int(DRAIN_SECONDS) + 2,
    )


class _Protocol(HttpToolsProtocol):
    """uvicorn's connection, bounded in memory and in time: heads have a size, heads and stalled readers a time limit, and the number of
    connections is limited at the cost of idle ones. Bodies are read by service.py, which has limits of its own."""

    most = 0  # connections; `uvicorn_config` makes a class with the number
    _head: int | None = None  # bytes of a request's head so far; None outside of one
    _in_body = False  # what comes belongs to a request's body, be it answered already
    _timer: asyncio.TimerHandle | None = None  # until a head must be complete
    _stall: asyncio.TimerHandle | None = None  # until a client that does not read is given up

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._since = self.loop.time()
        self._expect_head()
        if len(self.connections) > self.most:
            idle = [other for other in self.connections if isinstance(other, _Protocol) and other._is_idle]
            if idle:
                min(idle, key=lambda other: other._since).transport.abort()
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a peer that vanished is found out
            for name, value in KEEPALIVE.items():
                if hasattr(socket, name):
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._timer, self._stall):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        self._head, self._since = 0, self.loop.time()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head, self._in_body = None, True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_body = False
        super().on_message_complete()

    def data_received(self, data: bytes) -> None:
        if not self._in_body and data.partition(b"\r\n\r\n")[0].count(b"\n") > MAX_LINES:
            self._too_large()
            return
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._is_idle or self._head is not None:  # whatever came, a whole head must follow
            self._expect_head()
        if self._head is None:
            return
        self._head += len(data)
        if self._head > MAX_HEAD:
            self._too_large()

    def _too_large(self) -> None:
        self.transport.write(b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
        self.transport.close()

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _expect_head(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def pause_writing(self) -> None:
        """The client reads more slowly than we write: nothing more is written until it has caught up, for which it has a limited time."""
        super().pause_writing()
        if self._stall is None:
            self._stall = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
        super().resume_writing()


class Uvicorn(uvicorn.Server):
    """uvicorn whose application ends in good order even where connections are cut off."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.force_exit:
            await self.lifespan.shutdown()


class Server(Uvicorn):
    """uvicorn under our own signal handling: drain, then abort what is left; a second signal aborts at once."""

    def __init__(self, fleet: Fleet, listener: socket.socket) -> None:
        super().__init__(uvicorn_config(fleet))
        self._fleet, self._greeting = fleet, greeting(fleet, listener)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._greeting, flush=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def stop(self) -> None:
        """First call: no new requests, those that run may end within DRAIN_SECONDS. Second call: abort them."""
        if self.should_exit:
            self._fleet.abort_all()
            self.force_exit = True
            return
        log.info("stopping; %d requests may end within %.0f s, a second signal aborts them", self._fleet.unfinished, DRAIN_SECONDS)
        self._fleet.gate.draining = self.should_exit = True
        asyncio.get_running_loop().call_later(DRAIN_SECONDS, self._fleet.abort_all)
