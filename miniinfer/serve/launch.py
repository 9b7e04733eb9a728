"""Starting and stopping the server: the socket, the engine, signals. `serve` is what `miniinfer serve` calls.

Owns the life of the server's process. Imports neither uvicorn nor FastAPI, which take half as long as torch does in the engine process:
server.py is imported while that process starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import ssl
from collections.abc import Callable
from types import ModuleType
from typing import Any

import uvloop

from miniinfer.config import ConfigError, EngineConfig, ServerConfig
from miniinfer.engine.client import AsyncEngine, EngineDeadError
from miniinfer.serve.auth import load_keys
from miniinfer.serve.parsers import choose
from miniinfer.serve.specs import Spec, specs
from miniinfer.utils import setup_logging


def serve(engine: EngineConfig, server: ServerConfig) -> int:
    """Runs a server until SIGINT or SIGTERM and returns the process's exit code.

    Raises ConfigError for what the user can mend: a port in use, a model that cannot be loaded, a template that cannot be read."""
    setup_logging(server.log_level, server.log_format)
    choose(server.tool_call_parser, server.reasoning_parser, "", "")  # an unknown name should be known at once
    load_keys(server)  # a mistake in them should be known at once
    if server.otlp_endpoint is not None:
        from miniinfer.serve import tracing

        tracing.check(server.otlp_endpoint)
    if server.files_dir is not None:
        from miniinfer.serve import storage

        storage.Store(server).close()  # is it there, ours, and readable
    if server.grpc_port is not None:
        from miniinfer.serve import grpc  # noqa: F401  it says what is missing
    if server.pin_prefix:
        from miniinfer.serve import prefixes

        for path in server.pin_prefix:
            prefixes.read_file(path)

    _check_certificate(server)
    models = specs(engine, server)
    with contextlib.closing(_bind(server.host, server.port)) as listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            return runner.run(_run(models, server, listener))
        except EngineDeadError:  # while it was loading; the log has said why
            return 1
        except asyncio.CancelledError:  # a signal while the model was loading
            return 130


async def _run(models: list[Spec], server_config: ServerConfig, listener: socket.socket) -> int:
    signals, (first, *_) = _Signals(), models
    engine, fleet = AsyncEngine(first.engine, chat_template=first.server.chat_template), None
    try:
        _, parts = await asyncio.gather(engine.start(), asyncio.to_thread(_import_server))
        fleet = parts.Fleet(server_config, [parts.Member(spec.name, spec.engine, spec.server) for spec in models])
        fleet.adopt(engine)
        await parts.pin_files(fleet, server_config.pin_prefix or [])
        server = parts.Server(fleet, listener)
        signals.stop = server.stop
        remote = await _start_grpc(fleet, server_config)
        throughput = None if first.engine.disable_log_stats else asyncio.create_task(parts.log_throughput(fleet.metrics))
        await server.serve(sockets=[listener])
        if throughput is not None:
            throughput.cancel()
        if remote is not None:
            await remote.stop(parts.DRAIN_SECONDS)
        return 0
    finally:
        await engine.shutdown()
        if fleet is not None:
            await fleet.shutdown()


async def _start_grpc(fleet: Any, config: ServerConfig) -> Any:
    if config.grpc_port is None:
        return None
    from miniinfer.serve import grpc

    remote, port = await grpc.start(fleet, config.host, config.grpc_port)
    print(f"{fleet.default.model} is ready over gRPC at {config.host}:{port}", flush=True)
    return remote


def _import_server() -> ModuleType:
    from miniinfer.serve import server

    return server


def _check_certificate(server: ServerConfig) -> None:
    if server.ssl_certfile is None or server.ssl_keyfile is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(server.ssl_certfile, server.ssl_keyfile, password="")
    except (OSError, ValueError) as e:  # an SSLError is an OSError
        raise ConfigError(f"ssl_certfile, ssl_keyfile: {server.ssl_certfile} and {server.ssl_keyfile} cannot be used: {e}") from None


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


class _Signals:
    """SIGINT and SIGTERM: they cancel the start, and later call the server's `stop`."""

    def __init__(self) -> None:
        loop, main = asyncio.get_running_loop(), asyncio.current_task()
        assert main is not None
        self.stop: Callable[[], object] = main.cancel
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, lambda: self.stop())
