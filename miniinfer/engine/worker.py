"""The engine process: an EngineCore behind two sockets. `python -m miniinfer.engine.worker`, started by link.py only.

Owns the process's life and the message loop; the core decides everything else. Its start message (WorkerStart, JSON) comes on stdin, which
then stays open: its end tells that the parent is gone, however it died. Signals are the parent's business.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
import sys
import threading
import time
from typing import Any

import msgspec
import zmq

from miniinfer.config import ConfigError, EngineConfig
from miniinfer.data import Abort, Add, Control, Failed, Ready, Reply, SequenceUpdate, ToEngine, Updates
from miniinfer.utils import get_logger, setup_logging, starting

log = get_logger("engine.worker")

QUEUED_STEPS = 16  # at each end: with so many unread, a faster engine waits, instead of filling the parent's memory
HEARTBEAT_SECONDS = 1.0  # between messages while there is work: by the counters in them the parent sees that it gets on
LINGER_MS = 2000  # a last message gets this long to leave


class WorkerStart(msgspec.Struct):
    """What the parent tells a worker."""

    config: EngineConfig
    core: str  # "module:class", called with the config
    folder: str  # private directory that holds the two IPC sockets, bound by the parent
    log_level: str

    @property
    def to_engine(self) -> str:
        return f"ipc://{self.folder}/to_engine"

    @property
    def from_engine(self) -> str:
        return f"ipc://{self.folder}/from_engine"


def main() -> int:
    """Runs until stdin ends or the engine fails; never returns otherwise."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal or a service manager sends them to the whole group: the parent drains first
        signal.signal(number, signal.SIG_IGN)
    start = msgspec.json.decode(sys.stdin.buffer.readline(), type=WorkerStart)
    threading.Thread(target=_follow_parent, args=(start.folder,), daemon=True).start()
    setup_logging(start.log_level)
    with zmq.Context() as context, context.socket(zmq.PULL) as inbox, context.socket(zmq.PUSH) as outbox:
        inbox.set_hwm(0)
        outbox.set_hwm(QUEUED_STEPS)
        outbox.linger = LINGER_MS
        inbox.connect(start.to_engine)
        outbox.connect(start.from_engine)
        return run(start.config, start.core, inbox, outbox)


def run(config: EngineConfig, core: str, inbox: zmq.Socket[bytes], outbox: zmq.Socket[bytes]) -> int:
    """Builds the core, says Ready, and serves. Whatever goes wrong is sent as Failed, and 1 returned."""
    try:
        with starting(config.device):
            module, _, name = core.partition(":")
            engine = getattr(importlib.import_module(module), name)(config)
    except ConfigError as e:
        _send(outbox, Failed(str(e), user_error=True))
        return 1
    except Exception as e:
        log.exception("the engine could not start")
        _send(outbox, Failed(f"{type(e).__name__}: {e}"))
        return 1
    _send(outbox, Ready(engine.info))
    try:
        _serve(engine, inbox, outbox)
    except Exception as e:
        log.exception("the engine has failed")
        _send(outbox, Failed(f"{type(e).__name__}: {e}"))
    finally:
        with contextlib.suppress(Exception):  # a device that failed may fail again here
            engine.shutdown()
    return 1


def _serve(engine: Any, inbox: zmq.Socket[bytes], outbox: zmq.Socket[bytes]) -> None:
    """One turn: take in every message that is there, step if there is work, send what came of both as one message."""
    decoder = msgspec.msgpack.Decoder(ToEngine)
    beat = 0.0  # when the parent is to hear from us even if nothing has come of the work
    while True:
        if not engine.has_work:
            inbox.poll()  # sleeps until a message comes
        updates: list[SequenceUpdate] = []
        while inbox.poll(0):
            for frame in inbox.recv_multipart():
                match decoder.decode(frame):
                    case Add() as add:
                        updates += engine.add(add)
                    case Abort(ids):
                        updates += engine.abort(ids)
                    case Control() as control:
                        _send(outbox, _answer(engine, control))
        if engine.has_work:
            updates += engine.step()
        if updates or (engine.has_work and time.monotonic() > beat):
            _send(outbox, Updates(updates, engine.stats()))
            beat = time.monotonic() + HEARTBEAT_SECONDS


def _answer(engine: Any, control: Control) -> Reply:
    """A command that fails is reported to whoever gave it; the engine goes on."""
    try:
        return Reply(control.id, msgspec.to_builtins(engine.control(control.command, **control.arguments)))
    except Exception as e:
        log.warning("control %s: %s: %s", control.command, type(e).__name__, e)
        return Reply(control.id, None, f"{type(e).__name__}: {e}")


def _send(outbox: zmq.Socket[bytes], message: Updates | Ready | Failed | Reply) -> None:
    outbox.send(msgspec.msgpack.encode(message))


def _follow_parent(folder: str) -> None:
    """Waits for the end of stdin: the parent has died, or no longer wants this process, even if it is still loading. Nothing is to be saved."""
    os.read(sys.stdin.fileno(), 1)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
