"""EngineLink: one engine process, seen from the API process: its start, the sockets to and from it, and how it ended.

Owns the child process and everything that must go with it. A link ends once, for a reason, and is never used again: its successor has sockets of
its own, so that nothing a dead process has sent can be taken for news. Knows messages, but not requests. Imports no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from miniinfer.config import ConfigError, EngineConfig
from miniinfer.data import Failed, FromEngine, Ready, ToEngine, Updates
from miniinfer.engine.worker import QUEUED_STEPS, WorkerStart
from miniinfer.utils import get_logger

log = get_logger(__name__)

STOP_SECONDS = 5.0  # from the end of its stdin to SIGKILL
LONGEST_FOLDER = 60  # characters of the temporary directory; a socket's whole path must stay below 104 (macOS) or 108 (Linux)
LAST_WORDS_SECONDS = 0.3  # how long the reader may still find a message of a process that has ended
RETRY_SECONDS = 0.005  # until a message is sent that nobody was connected for
TICK = 0.5  # seconds between looks at a process that has work
STOPPED_TICKS = 2  # a process that was stopped (SIGSTOP) for so long will not come back by itself


class EngineDeadError(RuntimeError):
    """The engine process has ended, or was shut down; the message says what is known of the reason."""


class EngineLink:
    """A running engine process. `ready` is what it says of itself; `ended` is why it ended: ConfigError if the mend is the user's.

    `on_messages` gets what it sends, several messages at once if we are behind. While `busy()`, a process that makes no progress is taken to hang."""

    def __init__(self, config: EngineConfig, core: str, on_messages: Callable[[list[FromEngine]], None], busy: Callable[[], bool]) -> None:
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[dict[str, Any]] = loop.create_future()
        self.ended: asyncio.Future[Exception] = loop.create_future()
        self._config, self._core, self._on_messages, self._busy = config, core, on_messages, busy
        self._process: asyncio.subprocess.Process | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._closing = contextlib.ExitStack()  # what `close` undoes
        self._encoder = msgspec.msgpack.Encoder()
        self._unsent: deque[list[bytes]] = deque()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        self._working = asyncio.Event()  # something was sent since the process was last seen idle
        self._idle_ticks = 0  # without progress
        self._steps = 0.0

    async def open(self) -> None:
        """Sockets first, so that the child finds them; then the child, which sees the same modules as this process."""
        short = len(tempfile.gettempdir()) <= LONGEST_FOLDER
        folder = tempfile.mkdtemp(prefix="miniinfer-", dir=None if short else "/tmp")  # mode 0700: nobody else may connect
        self._closing.callback(shutil.rmtree, folder, ignore_errors=True)
        level = logging.getLevelName(logging.getLogger("miniinfer").getEffectiveLevel()).lower()
        start = WorkerStart(self._config, self._core, folder, level)
        self._outbox: zmq.Socket[bytes] = self._bind(zmq.Context(), zmq.PUSH, start.to_engine, 0)
        self._inbox: zmq.asyncio.Socket = self._bind(zmq.asyncio.Context(), zmq.PULL, start.from_engine, QUEUED_STEPS)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "miniinfer.engine.worker", stdin=asyncio.subprocess.PIPE, env=environment
        )
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(start) + b"\n")  # and never closed: its end tells the child of our death
        jobs = self._read(), self._watch(self._process), self._mind(self.pid)
        self._tasks = [asyncio.create_task(job) for job in jobs]

    @property
    def pid(self) -> int:
        """The process's, once `open` has returned."""
        assert self._process is not None
        return self._process.pid

    def _bind(self, context: zmq.Context[Any], kind: int, address: str, limit: int) -> Any:
        """A socket that queues `limit` messages (0: any number, so a send never waits) and does not linger when closed."""
        self._closing.callback(context.destroy, linger=0)
        socket = context.socket(kind)
        socket.set_hwm(limit)
        socket.bind(address)
        return socket

    async def settled(self) -> None:
        """Waits until the process is ready or has ended."""
        either: list[asyncio.Future[Any]] = [self.ready, self.ended]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)

    def send(self, *messages: ToEngine) -> None:
        """Messages that the engine gets together, with no step between them. What a process that has ended would get is dropped."""
        if not self.ended.done():
            self._unsent.append([self._encoder.encode(message) for message in messages])
            self._working.set()
            if len(self._unsent) == 1:
                self._flush()

    def _flush(self) -> None:
        """Sends what waits, in order. If nobody is connected, since the process has not got there yet or its end is not known yet, it tries again
        soon: a send that waits would hold up the loop, in the second case for good."""
        while self._unsent and not self.ended.done():
            try:
                self._outbox.send_multipart(self._unsent[0], zmq.NOBLOCK)
            except zmq.Again:
                asyncio.get_running_loop().call_later(RETRY_SECONDS, self._flush)
                return
            self._unsent.popleft()

    async def close(self, kill: bool = False) -> None:
        """Ends the process, with `kill` at once; leaves no socket, file or task behind. May be called more than once."""
        self.end(EngineDeadError("the engine was shut down"))
        process = self._process
        if process is not None and process.returncode is None:
            assert process.stdin is not None
            process.stdin.close()  # its end is the worker's
            try:
                await asyncio.wait_for(process.wait(), 0 if kill else STOP_SECONDS)
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        self._closing.close()

    def end(self, reason: Exception) -> None:
        """Nothing is taken from this process any more. The first reason counts."""
        if not self.ended.done():
            self.ended.set_result(reason)

    async def _read(self) -> None:
        """Takes in whatever has come, several steps at once if we are behind, and then lets the streams' consumers have their turn."""
        try:
            while not self.ended.done():
                frames = [await self._inbox.recv()]
                with contextlib.suppress(zmq.Again):
                    while len(frames) < 2 * QUEUED_STEPS:
                        frames.append(await self._inbox.recv(zmq.NOBLOCK))
                if self.ended.done():
                    return
                messages = [self._decoder.decode(frame) for frame in frames]
                self._on_messages(messages)
                for message in messages:
                    self._note(message)
                await asyncio.sleep(0)  # a receive that finds a message does not yield
        except Exception as e:  # a fault of ours: better that every stream ends than that all wait for ever
            log.exception("what the engine sent could not be handled")
            self.end(EngineDeadError(f"what the engine sent could not be handled: {type(e).__name__}: {e}"))

    def _note(self, message: FromEngine) -> None:
        match message:
            case Updates(updates, stats):
                steps = stats.get("steps", self._steps + 1)
                if updates or steps != self._steps:
                    self._idle_ticks, self._steps = 0, steps
            case Ready(info):
                if not self.ready.done():
                    self.ready.set_result(info)
            case Failed(error, user_error):
                self.end(ConfigError(error) if user_error else EngineDeadError(f"the engine has failed: {error}"))

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Waits for the process's end and hears its last words."""
        code = await process.wait()
        await asyncio.wait([self.ended], timeout=LAST_WORDS_SECONDS)
        how = f"was killed by signal {-code}" if code < 0 else f"exited with status {code}"
        self.end(EngineDeadError(f"the engine process {how}; its log may say why"))

    async def _mind(self, pid: int) -> None:
        """Ends the link if the process has work and does not get on. Counts its own ticks: where this process did not run either, none pass."""
        await self.settled()
        limit, stopped = self._config.hang_timeout / TICK, 0
        while not self.ended.done():
            await self._working.wait()
            self._idle_ticks = 0
            while self._busy() and not self.ended.done():
                await asyncio.sleep(TICK)
                self._idle_ticks += 1
                stopped = stopped + 1 if _is_stopped(pid) else 0
                if stopped >= STOPPED_TICKS:
                    self.end(EngineDeadError("the engine process was stopped and did not go on"))
                elif self._idle_ticks > limit:
                    self.end(EngineDeadError(f"the engine has made no progress for {self._config.hang_timeout:g} s"))
            self._working.clear()


def _is_stopped(pid: int) -> bool:
    """Does the system hold the process (SIGSTOP, a debugger). False where it does not tell."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:
        return False
