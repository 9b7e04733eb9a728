"""AsyncEngine: the engine seen from the API process. Starts the engine process, sends it requests, streams what comes back.

Owns the open streams, and is the supervisor: if the engine process ends or hangs (link.py tells), another takes its place, and what was open goes on
there, token by token as if nothing had happened (ledger.py has what is needed for that). Requests that come meanwhile wait. Text is made in
output.py, here in the parent, so that the engine process never waits for it, and a new one need not know of it. Imports no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from miniinfer.config import ConfigError, EngineConfig
from miniinfer.data import Abort, Add, Control, FromEngine, Reply, RequestOutput, SamplingParams, SequenceUpdate, Updates, check_sleep, sequence_seed
from miniinfer.engine.ledger import Ledger
from miniinfer.engine.link import EngineDeadError, EngineLink
from miniinfer.engine.output import OutputProcessor, merge, snapshot, validate
from miniinfer.engine.text import Tokenizer
from miniinfer.models.hub import resolve_folder
from miniinfer.utils import get_logger

__all__ = ["AsyncEngine", "EngineAsleepError", "EngineDeadError", "Prompt"]

log = get_logger(__name__)

Prompt = str | list[int] | dict[str, Any]  # text, token ids, or {"prompt": text} and/or {"prompt_token_ids": ids}

SHORT_TEXT = 4096  # characters; tokenizing up to so many takes about a millisecond, less than a thread's round trip is worth
SLEEP_MODES = ("wait", "abort")  # what becomes of open requests
RETIRING_SECONDS = 0.01  # between looks at whether they have ended
RESTART_WINDOW = 300.0  # seconds in which `max_engine_restarts` are counted


class EngineAsleepError(RuntimeError):
    """The engine sleeps, or is about to: it takes no requests until `wake_up`."""


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
        self._ledger = Ledger()
        self.pins: dict[str, Add] = {}  # what makes each pinned prefix, by id; may be handed on to an engine that takes this one's place
        self._sequences = itertools.count(1)
        self._link: EngineLink | None = None
        self._up = False  # is there a process that takes requests
        self._supervisor: asyncio.Task[None] | None = None
        self._restarts: deque[float] = deque()  # when, within the window
        self.num_restarts = 0
        self._dead: Exception | None = None
        self._stopping = False
        self.sleep_level = 0  # 0: awake; 1 or 2: asleep, at least in part, or no process at all
        self._retiring = False  # takes no more requests, since it is to sleep when those open have ended
        self._change = asyncio.Lock()  # one change between asleep and awake at a time
        self._changes: set[asyncio.Task[Any]] = set()
        self.errored = False  # has it died for good, other than by `shutdown`
        self._threads = ThreadPoolExecutor(2, "tokenize")

    # ---------------------------------------------------------------------------------------------------- life

    async def start(self, timeout: float = 1800.0) -> None:
        """Returns when the engine accepts work. Raises ConfigError if the mend is the user's, EngineDeadError if the engine fails, and TimeoutError
        after `timeout` seconds; nothing is left running then."""
        if self._link is not None:
            raise RuntimeError("an AsyncEngine starts once; make a new one")
        try:
            async with asyncio.timeout(timeout):
                self.tokenizer, _ = await asyncio.gather(asyncio.to_thread(self._load_tokenizer), self._connect())
        except BaseException as e:
            await self.shutdown()
            if isinstance(e, TimeoutError):
                raise TimeoutError(f"the engine did not start within {timeout:g} s") from None
            raise
        self._processor = OutputProcessor(self.tokenizer, deltas=True)
        self._is_up(timeout)

    def _is_up(self, timeout: float) -> None:
        self._up, self._timeout = True, timeout
        self._supervisor = asyncio.create_task(self._supervise(timeout))
        self._renew_pins()

    def _load_tokenizer(self) -> Tokenizer | None:
        if self.config.skip_tokenizer_init:
            return None
        own = self.config.tokenizer
        folder = resolve_folder(own or self.config.model, self.config.revision, "tokenizer.json" if own else "config.json")
        return Tokenizer.from_folder(folder, self._chat_template)

    async def _connect(self) -> None:
        """A new process, up to where it accepts work; raises the reason if it ends before."""
        self._link = link = EngineLink(self.config, self._core, self._receive, self._is_busy)
        await link.open()
        await link.settled()
        if not link.ready.done():
            raise _fresh(link.ended.result())
        self.info = link.ready.result()

    def _is_busy(self) -> bool:
        return bool(self._ledger) or bool(self._replies)

    async def _supervise(self, timeout: float) -> None:
        """`_replace` for as long as it works."""
        try:
            await self._replace(timeout)
        except Exception as e:  # a fault of ours: better that every stream ends than that all wait for ever
            log.exception("the engine process could not be replaced")
            self._die(EngineDeadError(f"the engine process could not be replaced: {type(e).__name__}: {e}"))

    async def _replace(self, timeout: float) -> None:
        """Puts a new process in the place of one that has ended, until that happens too often. One that was asleep is left to `wake_up`: what
        memory there is may be another's by now."""
        while self._dead is None:
            assert self._link is not None
            reason = await asyncio.shield(self._link.ended)
            self._up = False
            await self._link.close(kill=True)
            self._fail_replies(reason)
            self._blame(reason)
            if self.sleep_level:
                log.warning("%s; it was asleep, and another is started when it is to wake", reason)
                return
            while not self._up:
                if self._stopping or isinstance(reason, ConfigError) or not self._may_restart():
                    self._die(EngineDeadError(str(reason)))
                    return
                log.error("%s; starting it again, with %d requests to go on", reason, self.num_open)
                try:
                    async with asyncio.timeout(timeout):
                        await self._connect()
                    self._up = True
                except (EngineDeadError, ConfigError, OSError) as e:  # a TimeoutError is an OSError
                    reason = e
                    await self._link.close(kill=True)
            self._renew_pins()

    def _may_restart(self) -> bool:
        now = time.monotonic()
        while self._restarts and self._restarts[0] < now - RESTART_WINDOW:
            self._restarts.popleft()
        if len(self._restarts) >= self.config.max_engine_restarts:
            return False
        self._restarts.append(now)
        self.num_restarts += 1
        return True

    def _blame(self, reason: Exception) -> None:
        """Ends the request under which processes die. That a culprit is found is progress: the restarts that it cost are forgiven."""
        blamed = self._ledger.died()
        if blamed:
            log.error("%s: given up, because engine processes die under it", ", ".join(blamed))
            self._restarts.clear()
            error = f"engine processes died while they worked on this request ({reason})"
            self._update([Updates([SequenceUpdate(id, [], "error", error=error) for id in blamed], self.stats)])

    async def shutdown(self) -> None:
        """Ends the process and every open stream; leaves no socket, file or task behind. May be called at any time and more than once."""
        self._stopping = True
        self._die(EngineDeadError("the engine was shut down"))
        if self._supervisor is not None:
            self._supervisor.cancel()
        for task in self._changes:
            task.cancel()
        await asyncio.gather(*self._changes, *([self._supervisor] if self._supervisor else []), return_exceptions=True)
        if self._link is not None:
            await self._link.close()
        self._threads.shutdown(wait=False)

    @property
    def is_alive(self) -> bool:
        """Does it accept requests; while it is `restarting` they wait."""
        return bool(self.info) and self._dead is None

    @property
    def restarting(self) -> bool:
        """Is an engine process being started in the place of one that has ended."""
        return self.is_alive and not self._up and not self.sleep_level

    @property
    def is_sleeping(self) -> bool:
        """Does it refuse requests until `wake_up`."""
        return self.sleep_level > 0

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    # --------------------------------------------------------------------------------------------------- sleep

    async def sleep(self, level: int = 1, mode: str = "wait", tags: Sequence[str] | None = None) -> dict[str, Any]:
        """Gives the engine's memory back until `wake_up`: level 1 keeps the weights in host memory, level 2 reads them from the checkpoint again;
        `tags` names what is to sleep, if it is not everything. New requests raise EngineAsleepError from now on; those that are open end first
        (`mode` "wait") or at once ("abort"). Returns figures. ValueError for a bad value, or if the engine cannot sleep. Goes on to its end even
        if the caller is cancelled."""
        if not self.config.enable_sleep_mode:
            raise ValueError("enable_sleep_mode: the engine was started without it, so it cannot sleep")
        check_sleep(level, tags)
        if mode not in SLEEP_MODES:
            raise ValueError(f"mode: must be one of {', '.join(SLEEP_MODES)}, got {mode!r}")
        self._check_alive()
        return await self._to_its_end(self._sleep(level, mode, tags))

    async def wake_up(self, tags: Sequence[str] | None = None) -> dict[str, Any]:
        """Undoes `sleep`, for all or some of what sleeps; a process that has ended meanwhile is replaced by a new one, all awake. If it fails
        (RuntimeError, ConfigError, EngineDeadError, OSError) the engine is still asleep. Goes on to its end even if the caller is cancelled."""
        check_sleep(1, tags)
        self._check_alive()
        return await self._to_its_end(self._wake_up(tags))

    async def _to_its_end(self, change: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
        task = asyncio.create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        return await asyncio.shield(task)

    async def _sleep(self, level: int, mode: str, tags: Sequence[str] | None) -> dict[str, Any]:
        async with self._change:
            self._retiring = True
            try:
                for request_id in list(self._streams) if mode == "abort" else ():
                    self.abort(request_id)
                while self._streams or self._ledger or self.restarting:  # what pins are made of is in the ledger alone
                    await asyncio.sleep(RETIRING_SECONDS)
                self._check_alive()
                before, self.sleep_level = self.sleep_level, max(self.sleep_level, level)  # ahead of the process, lest it be replaced if it dies
                try:
                    return await self.control("sleep", level=level, tags=tags)  # type: ignore[no-any-return]
                except EngineDeadError as e:
                    self._check_alive()
                    return {"level": self.sleep_level, "bytes": 0, "note": f"no memory is held: {e}"}
                except BaseException:
                    self.sleep_level = before
                    raise
            finally:
                self._retiring = False

    async def _wake_up(self, tags: Sequence[str] | None) -> dict[str, Any]:
        async with self._change:
            if self.sleep_level and self._up:
                with contextlib.suppress(EngineDeadError):
                    report: dict[str, Any] = await self.control("wake_up", tags=tags)
                    if self._up:
                        self.sleep_level = report["level"]
                        if not self.sleep_level:
                            self._renew_pins()
                        return report
            begin = time.monotonic()
            if self.sleep_level:
                await self._start_again()
            return {"level": 0, "bytes": 0, "seconds": round(time.monotonic() - begin, 4)}

    async def _start_again(self) -> None:
        """A new process in the place of one that ended asleep."""
        assert self._supervisor is not None
        await asyncio.wait([self._supervisor])  # it takes down what is left of the other
        self._check_alive()
        try:
            async with asyncio.timeout(self._timeout):
                await self._connect()
        except BaseException:
            if self._link is not None:
                await self._link.close(kill=True)
            raise
        self.sleep_level = 0
        self.num_restarts += 1
        self._is_up(self._timeout)
        self._send_due()

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
        pooling: str | None = None,
        pin: bool = False,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Streams a request's output, whole so far each time or (`delta`) only what is new. Leaving the iterator in any way aborts the request.

        Raises ValueError naming the field, before the first output, for a request that cannot run; EngineDeadError if the engine dies for good.
        With `pooling` ("last" or "mean") there is one output, without tokens, and `embedding` in it: the prompt's pooled hidden states.
        If a process dies and another takes its place, the stream pauses."""
        text, ids = await self._prompt(prompt)
        validate(ids, params, self.info, self.tokenizer, pooling is not None)
        self._check_alive()
        if self.sleep_level or self._retiring:
            raise EngineAsleepError("the engine is asleep: it takes no requests until it is woken up")
        request_id = request_id or uuid.uuid4().hex
        messages = self._processor.add(request_id, text, ids, params, priority, cache_salt)
        for index, message in enumerate(messages):
            message.pooling, message.pin = pooling, pin
            message.seed = sequence_seed(params, index, self.config.seed, next(self._sequences))
        stream = self._streams[request_id] = _Stream()
        self._ledger.open(request_id, messages)
        total: RequestOutput | None = None
        try:
            self._send_due()
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
        self._ledger.close(ids)
        if ids and self._up:
            self._send(Abort(ids))
            self._send_due()

    async def pin(self, id: str, tokens: list[int], cache_salt: str = "") -> RequestOutput:
        """Computes a prefix and has its KV pages go after all others until `unpin`, in this process and in any that takes its place.

        Returns how that went; if it has an `error` there is no pin, and it is `invalid` if there is no room for one. Raises as `generate` does."""
        params = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
        done = False
        try:
            async for output in self.generate(tokens, params, id, cache_salt=cache_salt, pin=True):
                done = output.finished and output.error is None and output.outputs[0].finish_reason != "abort"
            if done:
                self.pins[id] = Add(id, tokens, params, cache_salt=cache_salt, pin=True)
            return output
        finally:
            if not done:
                self.unpin(id)

    def unpin(self, id: str) -> None:
        """Makes a pinned prefix like any other. An unknown id is ignored."""
        self.pins.pop(id, None)
        self._ledger.close([id])
        if self._up:
            self._send(Abort([id]))

    def _renew_pins(self) -> None:
        """Has what is pinned computed where it is not: in a new process, or after sleep. Nobody waits for it."""
        for id, add in self.pins.items():
            if id not in self._ledger:
                self._ledger.open(id, [msgspec.structs.replace(add, output=[])])
        self._send_due()

    async def control(self, command: str, **arguments: Any) -> Any:
        """The engine's answer to a command outside the request flow ("stats", "check", "start_profile", ...). RuntimeError if it fails there,
        EngineDeadError if the process ends or is being restarted."""
        self._check_alive()
        if not self._up:
            raise EngineDeadError("the engine process has ended" if self.sleep_level else "the engine process is being restarted")
        id = next(self._reply_ids)
        reply = self._replies[id] = asyncio.get_running_loop().create_future()
        try:
            self._send(Control(id, command, arguments))
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

    def _send(self, *messages: Abort | Control) -> None:
        assert self._link is not None
        self._link.send(*messages)

    def _send_due(self) -> None:
        """Sends what the ledger wants sent now; a request's sequences get there together, with no step between them."""
        if self._up and self._link is not None:
            for messages in self._ledger.due():
                self._link.send(*messages)

    # ------------------------------------------------------------------------------------------- what comes back

    def _receive(self, messages: list[FromEngine]) -> None:
        try:
            self._update([message for message in messages if isinstance(message, Updates)])
        except Exception as e:  # a fault of ours, which another process would not mend
            log.exception("what the engine sent could not be handled")
            self._die(EngineDeadError(f"what the engine sent could not be handled: {type(e).__name__}: {e}"))
        for message in messages:
            if isinstance(message, Reply):
                reply = self._replies.get(message.id)
                if reply is not None and not reply.done():
                    reply.set_exception(RuntimeError(message.error)) if message.error else reply.set_result(message.value)

    def _update(self, steps: list[Updates]) -> None:
        if not steps:
            return
        self.stats = steps[-1].stats
        updates = [update for step in steps for update in step.updates]
        ended = []
        for update in updates:
            self._ledger.produced(update.id, update.token_ids)
            if update.finish_reason is not None:
                ended.append(update.id)
            if update.error is not None and update.id in self.pins:
                del self.pins[update.id]
                log.error("a pinned prefix could not be computed again: %s", update.error)
        deltas, aborts = self._processor.process(updates)
        self._put(deltas)
        self._ledger.close(ended + aborts)
        if aborts:
            self._send(Abort(aborts))
        self._send_due()

    def _put(self, deltas: list[RequestOutput]) -> None:
        for delta in deltas:
            stream = self._streams[delta.request_id]
            stream.put(delta)
            if delta.finished:
                del self._streams[delta.request_id]

    def _fail_replies(self, error: Exception) -> None:
        for future in self._replies.values():
            if not future.done():
                future.set_exception(EngineDeadError(str(error)))
                future.exception()  # if nobody waits for it any more, nobody need be warned

    def _die(self, error: Exception) -> None:
        """Ends everything that waits. The first reason counts."""
        if self._dead is not None:
            return
        self._dead, self._up = error, False
        self.errored = not self._stopping
        if self.errored:
            log.error("%s", error)
        self._ledger.close(self._processor.drop(self._streams))
        for stream in self._streams.values():
            stream.fail(_fresh(error))
        self._streams.clear()
        self._fail_replies(error)


def _fresh(error: Exception) -> Exception:
    """A copy to raise: an exception raised in several tasks would collect the tracebacks of all."""
    return type(error)(str(error))
