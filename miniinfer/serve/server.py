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
from miniinfer.serve.metrics import log_throughput
from miniinfer.serve.service import Service
from miniinfer.utils import get_logger

__all__ = ["Service", "Server", "greeting", "log_throughput", "uvicorn_config"]

log = get_logger(__name__)

DRAIN_SECONDS = 5.0  # how long a stopping server lets open requests go on
MAX_HEAD = 64 << 10  # bytes of a request line and its headers


def greeting(service: Service, listener: socket.socket) -> str:
    """Where the server is, its page, and a command that talks to it."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    tokenizer, url = service.engine.tokenizer, f"http://{host}:{port}/v1"
    body: dict[str, Any] = {"model": service.model}
    if tokenizer is None:
        path, body = "completions", body | {"prompt": [1, 2, 3]}
    elif "default" in tokenizer.chat_templates:
        path, body = "chat/completions", body | {"messages": [{"role": "user", "content": "Hello! What are you?"}]}
    else:
        path, body = "completions", body | {"prompt": "Once upon a time"}
    key = "" if not service.config.guarded else " -H 'Authorization: Bearer YOUR-KEY'"
    curl = f"curl {url}/{path} -H 'Content-Type: application/json'{key} -d {shlex.quote(json.dumps(body, ensure_ascii=False))}"
    page = url.removesuffix("v1")
    return f"{service.model} is ready at {url} and, in a browser, at {page} (Ctrl+C stops it). Try:\n  {curl}"


def uvicorn_config(service: Service) -> uvicorn.Config:
    """How uvicorn runs our application; its log has our handlers, and only errors to tell."""
    return uvicorn.Config(
        build_app(service),
        port=0,  # of no effect where the socket is given
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=65,  # longer than the 60 s after which common proxies let go of an idle connection
        timeout_graceful_shutdown=int(DRAIN_SECONDS) + 2,
    )


class _Protocol(HttpToolsProtocol):
    """uvicorn's connection with a limit on what comes before a body, which it would collect without end."""

    _head: int | None = None  # bytes of a request's head so far; None outside of one

    def on_message_begin(self) -> None:
        self._head = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head = None
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head is None or self.transport.is_closing():
            return
        self._head += len(data)
        if self._head > MAX_HEAD:
            self.transport.write(b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
            self.transport.close()


class Server(uvicorn.Server):
    """uvicorn under our own signal handling: drain, then abort what is left; a second signal aborts at once."""

    def __init__(self, service: Service, listener: socket.socket) -> None:
        super().__init__(uvicorn_config(service))
        self._service, self._greeting = service, greeting(service, listener)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._greeting, flush=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def stop(self) -> None:
        """First call: no new requests, those that run may end within DRAIN_SECONDS. Second call: abort them."""
        if self.should_exit:
            self._service.abort_all()
            self.force_exit = True
            return
        log.info("stopping; %d requests may end within %.0f s, a second signal aborts them", self._service.unfinished, DRAIN_SECONDS)
        self._service.draining = self.should_exit = True
        asyncio.get_running_loop().call_later(DRAIN_SECONDS, self._service.abort_all)
