"""AsyncEngine: the engine seen from the API process. Starts the engine process, sends it requests, streams what comes back.

Owns the child process, the sockets and the open streams. Text is made in output.py, here in the parent, so that the engine process never waits
for it. Imports no torch. Restarting a dead engine is not done here: open streams end with EngineDeadError.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from miniinfer.config import ConfigError, EngineConfig
from miniinfer.data import Abort, Control, Failed, FromEngine, Ready, Reply, RequestOutput, SamplingParams, ToEngine, Updates
from miniinfer.engine.output import OutputProcessor, merge, snapshot, validate
from miniinfer.engine.text import Tokenizer
from miniinfer.engine.worker import QUEUED_STEPS, WorkerStart
from miniinfer.models.hub import resolve_folder
from miniinfer.utils import get_logger

__all__ = ["AsyncEngine", "EngineDeadError", "Prompt"]

log = get_logger(__name__)

Prompt = str | list[int] | dict[str, Any]  # text, token ids, or {"prompt": text} and/or {"prompt_token_ids": ids}

SHORT_TEXT = 4096  # characters; tokenizing up to so many takes about a millisecond, less than a thread's round trip is worth
STOP_SECONDS = 5.0  # from the end of its stdin to SIGKILL
LONGEST_FOLDER = 60  # characters of the temporary directory; a socket's whole path must stay below 104 (macOS) or 108 (Linux)
LAST_WORDS_SECONDS = 0.3  # how long the reader may still find a message of a process that has ended


class EngineDeadError(RuntimeError):
    """The engine process has ended, or was shut down; the message says what is known of the reason."""


class _Stream:
    """One request's mailbox with a single slot: what arrives before its consumer wakes is merged, so a slow one holds up nobody."""

    __slots__ = ("error", "event", "waiting")

    def __init__(self) -> None:
        self.waiting: RequestOutput | None = None
        self.error: Exception | None = None
        self.event = asyncio.Event()

    def put(self, delta: RequestOutput) -> None:
        if self.waiting is None:
            self.waiting = delta
        else:
            merge(self.waiting, delta)
        self.event.set()

    def fail(self, error: Exception) -> None:
        self.error = error
        self.event.set()

    async def get(self) -> RequestOutput:
        """What is new; what came before a failure is handed over before the failure is raised."""
        await self.event.wait()
        delta, self.waiting = self.waiting, None
        if delta is None:
            assert self.error is not None
            raise self.error
        if self.error is None:
            self.event.clear()
        return delta


class AsyncEngine:
    """An engine process of its own. Belongs to the event loop that calls `start`; not for use from other threads.

    After `start`: `info` (what the engine says of itself), `tokenizer` (None with skip_tokenizer_init), `stats` (its latest counters)."""

    def __init__(self, config: EngineConfig, *, chat_template: str | None = None, core: str = "miniinfer.engine.core:EngineCore") -> None:
        """`chat_template`: a file to use instead of the checkpoint's. `core`: "module:class" to run in the process; tests bring their own."""
        self.config = config
        self.info: dict[str, Any] = {}
        self.stats: dict[str, float] = {}
        self.tokenizer: Tokenizer | None = None
        self._chat_template = chat_template
        self._core = core
        self._processor = OutputProcessor(None, deltas=True)
        self._streams: dict[str, _Stream] = {}
        self._replies: dict[int, asyncio.Future[Any]] = {}
        self._reply_ids = itertools.count()
        self._process: asyncio.subprocess.Process | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._ready: asyncio.Future[dict[str, Any]] | None = None
        self._dead: Exception | None = None
        self._stopping = False
        self.errored = False  # has it died, other than by `shutdown`
        self._threads = ThreadPoolExecutor(2, "tokenize")
        self._closing = contextlib.ExitStack()  # what shutdown undoes
        self._closing.callback(self._threads.shutdown, wait=False)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)

    # ---------------------------------------------------------------------------------------------------- life

    async def start(self, timeout: float = 1800.0) -> None:
        """Returns when the engine accepts work. Raises ConfigError if the mend is the user's, EngineDeadError if the engine fails, and TimeoutError
        after `timeout` seconds; nothing is left running then."""
        if self._process is not None:
            raise RuntimeError("an AsyncEngine starts once; make a new one")
        self._ready = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout):
                await self._spawn()
                self.tokenizer, self.info = await asyncio.gather(asyncio.to_thread(self._load_tokenizer), self._ready)
        except BaseException as e:
            await self.shutdown()
            if isinstance(e, TimeoutError):
                raise TimeoutError(f"the engine did not start within {timeout:g} s") from None
            raise
        self._processor = OutputProcessor(self.tokenizer, deltas=True)

    def _load_tokenizer(self) -> Tokenizer | None:
        if self.config.skip_tokenizer_init:
            return None
        own = self.config.tokenizer
        folder = resolve_folder(own or self.config.model, self.config.revision, "tokenizer.json" if own else "config.json")
        return Tokenizer.from_folder(folder, self._chat_template)

    async def _spawn(self) -> None:
        """Sockets first, so that the child finds them; then the child, which sees the same modules as this process."""
        short = len(tempfile.gettempdir()) <= LONGEST_FOLDER
        folder = tempfile.mkdtemp(prefix="miniinfer-", dir=None if short else "/tmp")  # mode 0700: nobody else may connect
        self._closing.callback(shutil.rmtree, folder, ignore_errors=True)
        level = logging.getLevelName(logging.getLogger("miniinfer").getEffectiveLevel()).lower()
        start = WorkerStart(self.config, self._core, folder, level)
        self._outbox: zmq.Socket[bytes] = self._bind(zmq.Context(), zmq.PUSH, start.to_engine, 0)
        self._inbox: zmq.asyncio.Socket = self._bind(zmq.asyncio.Context(), zmq.PULL, start.from_engine, QUEUED_STEPS)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "miniinfer.engine.worker", stdin=asyncio.subprocess.PIPE, env=environment
        )
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(start) + b"\n")  # and never closed: its end tells the child of our death
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._watch(self._process))]

    def _bind(self, context: zmq.Context[Any], kind: int, address: str, limit: int) -> Any:
        """A socket that queues `limit` messages (0: any number, so a send never waits) and does not linger when closed."""
        self._closing.callback(context.destroy, linger=0)
        socket = context.socket(kind)
        socket.set_hwm(limit)
        socket.bind(address)
        return socket

    async def shutdown(self) -> None:
        """Ends the process and every open stream; leaves no socket, file or task behind. May be called at any time and more than once."""
        self._stopping = True
        self._die(EngineDeadError("the engine was shut down"))
        process = self._process
        if process is not None and process.returncode is None:
            assert process.stdin is not None
            process.stdin.close()  # its end is the worker's
            try:
                await asyncio.wait_for(process.wait(), STOP_SECONDS)
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        self._closing.close()

    @property
    def is_alive(self) -> bool:
        """Does it accept requests."""
        return bool(self.info) and self._dead is None

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    # ------------------------------------------------------------------------------------------------ requests

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, without holding up the event loop if it is long. ValueError without a tokenizer."""
        if self.tokenizer is None:
            raise ValueError("prompt: the engine has no tokenizer (skip_tokenizer_init); give token ids")
        if len(text) <= SHORT_TEXT:
            return self.tokenizer.encode(text, add_special_tokens)
        return await asyncio.get_running_loop().run_in_executor(self._threads, self.tokenizer.encode, text, add_special_tokens)

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        delta: bool = False,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Streams a request's output, whole so far each time or (`delta`) only what is new. Leaving the iterator in any way aborts the request.

        Raises ValueError naming the field, before the first output, for a request that cannot run; EngineDeadError if the engine dies."""
        text, ids = await self._prompt(prompt)
        validate(ids, params, self.info, self.tokenizer)
        self._check_alive()
        request_id = request_id or uuid.uuid4().hex
        messages = self._processor.add(request_id, text, ids, params, priority, cache_salt)
        stream = self._streams[request_id] = _Stream()
        total: RequestOutput | None = None
        try:
            self._send(*messages)
            while total is None or not total.finished:
                new = await stream.get()
                if delta or total is None:
                    total = new
                else:
                    merge(total, new)
                yield total if delta else snapshot(total)
        finally:
            if self._streams.get(request_id) is stream:
                self.abort(request_id)

    def abort(self, request_id: str) -> None:
        """Ends a request at once: its stream gets a last output with finish_reason "abort". An unknown id is ignored."""
        stream = self._streams.pop(request_id, None)
        if stream is None:
            return
        last, ids = self._processor.abort(request_id)
        for delta in last:
            stream.put(delta)
        if ids and self._dead is None:
            self._send(Abort(ids))

    async def control(self, command: str) -> Any:
        """The engine's answer to a command outside the request flow ("stats", "check", "start_profile", ...). RuntimeError if it fails there."""
        self._check_alive()
        id = next(self._reply_ids)
        reply = self._replies[id] = asyncio.get_running_loop().create_future()
        try:
            self._send(Control(id, command))
            return await reply
        finally:
            del self._replies[id]

    async def _prompt(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, str):
            prompt = {"prompt": prompt}
        elif isinstance(prompt, list):
            prompt = {"prompt_token_ids": prompt}
        elif not isinstance(prompt, dict):
            raise ValueError(f"prompt: must be text, a list of token ids or a dict, got {type(prompt).__name__}")
        text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        if ids is not None:
            if not isinstance(ids, list):
                raise ValueError(f"prompt_token_ids: must be a list of integers, got {type(ids).__name__}")
            return text, ids
        if not isinstance(text, str):
            raise ValueError("prompt: a dict needs 'prompt' (text) or 'prompt_token_ids' (a list of integers)")
        return text, await self.encode(text)

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise _fresh(self._dead)
        if not self.info:
            raise RuntimeError("the engine has not been started: await start() first")

    def _send(self, *messages: ToEngine) -> None:
        """Messages that the engine gets together, with no step between them."""
        self._outbox.send_multipart([self._encoder.encode(message) for message in messages])

    # ------------------------------------------------------------------------------------------- what comes back

    async def _read(self) -> None:
        """Takes in whatever has come, several steps at once if we are behind, and then lets the streams' consumers have their turn."""
        try:
            while True:
                frames = [await self._inbox.recv()]
                with contextlib.suppress(zmq.Again):
                    while len(frames) < 2 * QUEUED_STEPS:
                        frames.append(await self._inbox.recv(zmq.NOBLOCK))
                messages = [self._decoder.decode(frame) for frame in frames]
                self._update([message for message in messages if isinstance(message, Updates)])
                for message in messages:
                    self._receive(message)
                await asyncio.sleep(0)  # a receive that finds a message does not yield
        except Exception as e:  # a fault of ours: better that every stream ends than that all wait for ever
            log.exception("what the engine sent could not be handled")
            self._die(EngineDeadError(f"what the engine sent could not be handled: {type(e).__name__}: {e}"))

    def _update(self, steps: list[Updates]) -> None:
        if not steps:
            return
        self.stats = steps[-1].stats
        deltas, aborts = self._processor.process([update for step in steps for update in step.updates])
        for delta in deltas:
            stream = self._streams[delta.request_id]
            stream.put(delta)
            if delta.finished:
                del self._streams[delta.request_id]
        if aborts:
            self._send(Abort(aborts))

    def _receive(self, message: FromEngine) -> None:
        match message:
            case Reply(id, value, error):
                reply = self._replies.get(id)
                if reply is not None and not reply.done():
                    reply.set_exception(RuntimeError(error)) if error else reply.set_result(value)
            case Ready(info):
                assert self._ready is not None
                if not self._ready.done():
                    self._ready.set_result(info)
            case Failed(error, user_error):
                self._die(ConfigError(error) if user_error else EngineDeadError(f"the engine has failed: {error}"))

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Waits for the process's end, hears its last words, and ends all streams."""
        code = await process.wait()
        end = time.monotonic() + LAST_WORDS_SECONDS
        while self._dead is None and time.monotonic() < end:
            await asyncio.sleep(0.01)
        how = f"was killed by signal {-code}" if code < 0 else f"exited with status {code}"
        self._die(EngineDeadError(f"the engine process {how}; its log may say why"))

    def _die(self, error: Exception) -> None:
        """Ends everything that waits. The first reason counts."""
        if self._dead is not None:
            return
        self._dead = error
        self.errored = not self._stopping
        if self.errored:
            log.error("%s", error)
        self._processor.drop(self._streams)
        for stream in self._streams.values():
            stream.fail(_fresh(error))
        self._streams.clear()
        for future in [*self._replies.values(), *([self._ready] if self._ready else [])]:
            if not future.done():
                future.set_exception(_fresh(error))
                future.exception()  # if nobody waits for it any more, nobody need be warned


def _fresh(error: Exception) -> Exception:
    """A copy to raise: an exception raised in several tasks would collect the tracebacks of all."""
    return type(error)(str(error))
