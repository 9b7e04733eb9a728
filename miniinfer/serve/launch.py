"""Starting and stopping the server: the socket, the engine, uvicorn, signals.

Owns the life of the server's process and what it prints. `serve` is what `miniinfer serve` calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from miniinfer.config import ConfigError, EngineConfig, ServerConfig, read_generation_config
from miniinfer.engine.client import AsyncEngine, EngineDeadError
from miniinfer.serve.metrics import log_throughput
from miniinfer.serve.openai import Api, build_app
from miniinfer.utils import get_logger, setup_logging

log = get_logger(__name__)

DRAIN_SECONDS = 5.0  # how long a stopping server lets open requests go on
MAX_HEAD = 64 << 10  # bytes of a request line and its headers
_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # taken from generation_config.json


def serve(engine: EngineConfig, server: ServerConfig) -> int:
    """Runs a server until SIGINT or SIGTERM and returns the process's exit code.

    Raises ConfigError for what the user can mend: a port in use, a model that cannot be loaded, a template that cannot be read."""
    setup_logging(server.log_level)
    with contextlib.closing(_bind(server.host, server.port)) as listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            return runner.run(_run(engine, server, listener))
        except EngineDeadError:  # while it was loading; the log has said why
            return 1
        except asyncio.CancelledError:  # a signal while the model was loading
            return 130


async def _run(config: EngineConfig, server_config: ServerConfig, listener: socket.socket) -> int:
    signals = _Signals()
    engine = AsyncEngine(config, chat_template=server_config.chat_template)
    try:
        await engine.start()
        api = Api(engine, server_config, model_name(config.model, server_config), sampling_defaults(engine.info))
        server = _Server(api, listener)
        signals.stop = server.stop
        throughput = None if config.disable_log_stats else asyncio.create_task(log_throughput(api.metrics, lambda: engine.stats))
        await server.serve(sockets=[listener])
        if throughput is not None:
            throughput.cancel()
        return 0
    finally:
        await engine.shutdown()


def model_name(model: str, config: ServerConfig) -> str:
    """What clients call the model: as configured, else a folder's own name, else the hub name as it is."""
    return config.served_model_name or (Path(model).resolve().name if Path(model).is_dir() else model)


def sampling_defaults(info: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint's own recommendation, which holds for what a client leaves open."""
    values = read_generation_config(Path(info["folder"]))
    return {name: values[name] for name in _SAMPLING_DEFAULTS if values.get(name) is not None}


def _bind(host: str, port: int) -> socket.socket:
    """The socket, taken before the model is loaded: a port in use should be known at once."""
    if not 0 <= port < 1 << 16:  # getaddrinfo would take it modulo 65536
        raise ConfigError(f"port: must be from 0 (any free one) to 65535, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as e:
        reason = os.strerror(e.errno) if e.errno and e.errno > 0 else str(e)  # getaddrinfo's own numbers are negative
        raise ConfigError(f"port: cannot listen on {host}:{port} ({reason}); choose another with --port or --host") from None
    return listener


def greeting(api: Api, listener: socket.socket) -> str:
    """Where the server is, and a command that talks to it."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    tokenizer, url = api.engine.tokenizer, f"http://{host}:{port}/v1"
    body: dict[str, Any] = {"model": api.model}
    if tokenizer is None:
        path, body = "completions", body | {"prompt": [1, 2, 3]}
    elif "default" in tokenizer.chat_templates:
        path, body = "chat/completions", body | {"messages": [{"role": "user", "content": "Hello! What are you?"}]}
    else:
        path, body = "completions", body | {"prompt": "Once upon a time"}
    key = "" if api.config.api_key is None else " -H 'Authorization: Bearer YOUR-KEY'"
    curl = f"curl {url}/{path} -H 'Content-Type: application/json'{key} -d {shlex.quote(json.dumps(body, ensure_ascii=False))}"
    return f"{api.model} is ready at {url} (Ctrl+C stops it). Try:\n  {curl}"


def uvicorn_config(api: Api) -> uvicorn.Config:
    """How uvicorn runs our application; its log has our handlers, and only errors to tell."""
    return uvicorn.Config(
        build_app(api),
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


class _Server(uvicorn.Server):
    """uvicorn under our own signal handling: drain, then abort what is left; a second signal aborts at once."""

    def __init__(self, api: Api, listener: socket.socket) -> None:
        super().__init__(uvicorn_config(api))
        self._api, self._greeting = api, greeting(api, listener)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._greeting, flush=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def stop(self) -> None:
        """First call: no new requests, those that run may end within DRAIN_SECONDS. Second call: abort them."""
        if self.should_exit:
            self._api.abort_all()
            self.force_exit = True
            return
        log.info("stopping; %d requests may end within %.0f s, a second signal aborts them", self._api.unfinished, DRAIN_SECONDS)
        self._api.draining = self.should_exit = True
        asyncio.get_running_loop().call_later(DRAIN_SECONDS, self._api.abort_all)


class _Signals:
    """SIGINT and SIGTERM: they cancel the start, and later call the server's `stop`."""

    def __init__(self) -> None:
        loop, main = asyncio.get_running_loop(), asyncio.current_task()
        assert main is not None
        self.stop: Callable[[], object] = main.cancel
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, lambda: self.stop())
