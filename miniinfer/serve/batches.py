"""OpenAI's Batch API: a file of requests that run when the server has room for them, at the price of nobody's latency.

Owns a batch as an object and its life, which is on disk: with --files-dir it goes on after a restart where it was. Its lines are batch_lines.py's,
files storage.py's. A batch's record is written whenever its status changes; how far it has come is what its output and error files say.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Query
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from miniinfer.serve.admission import Caller
from miniinfer.serve.answers import encode
from miniinfer.serve.batch_lines import Checked, Line, LineError, Result, Results, Runner, ask, check, read_lines
from miniinfer.serve.files import LONGEST_LIFE, SHORTEST_LIFE, listed, owner, page
from miniinfer.serve.fleet import Fleet
from miniinfer.serve.protocol import ApiError, Strict
from miniinfer.serve.schemas import Shape, described
from miniinfer.serve.storage import Entry, Store, new_id, read, write
from miniinfer.utils import get_logger

log = get_logger(__name__)

MAX_LINES = 50_000  # of one batch
MAX_OPEN, MAX_KEPT = 100, 10_000  # batches of one client that have not ended, and all of its batches
LINE_OVERHEAD = 8 << 10  # bytes of a line beyond its body
ENDED = ("completed", "failed", "expired", "cancelled")

# ------------------------------------------------------------------------------------------------------------ bodies


class ExpiresAfter(Strict):
    anchor: Literal["created_at"]
    seconds: int = Field(ge=SHORTEST_LIFE, le=LONGEST_LIFE)


class BatchRequest(Strict):
    """/v1/batches. The window is a number of hours: what is not done by then is not done at all."""

    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
    completion_window: str = Field(pattern=r"^[1-9][0-9]{0,3}h$")
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = Field(None, max_length=16)
    output_expires_after: ExpiresAfter | None = None


class CountsShape(Shape):
    total: int
    completed: int
    failed: int


class BatchShape(Shape):
    id: str
    object: Literal["batch"]
    endpoint: str
    input_file_id: str
    completion_window: str
    status: Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    expires_at: int
    request_counts: CountsShape
    errors: dict[str, Any] | None
    metadata: dict[str, str] | None
    usage: dict[str, Any] | None


class BatchList(Shape):
    object: Literal["list"]
    data: list[BatchShape]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Record(msgspec.Struct):
    """A batch as it is on disk. Times are there once the batch has come so far."""

    id: str
    owner: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    output_id: str  # where results go; files of the client's own when the batch has ended
    error_id: str
    metadata: dict[str, str] | None = None
    output_seconds: int | None = None  # that the output files are to live
    status: str = "validating"
    model: str | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: list[LineError] = []
    usage: dict[str, Any] | None = None
    times: dict[str, int] = {}  # by status

    def shown(self) -> dict[str, Any]:
        """As the API shows it."""
        same = "id endpoint input_file_id completion_window created_at expires_at metadata status model output_file_id error_file_id usage".split()
        statuses = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
        return {
            **{name: getattr(self, name) for name in same},
            **{f"{status}_at": self.times.get(status) for status in statuses},
            "object": "batch",
            "errors": {"object": "list", "data": self.errors} if self.errors else None,
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
        }

    @property
    def ended(self) -> bool:
        return self.status in ENDED


# -------------------------------------------------------------------------------------------------------------- life


class Batches:
    """All batches of a server, and the tasks of those that have not ended."""

    def __init__(self, fleet: Fleet, store: Store) -> None:
        self._fleet, self._store = fleet, store
        self._app: ASGIApp
        self._slots: asyncio.Semaphore  # for lines that run, of all batches; who waits is served in turn
        self._checking = asyncio.Lock()  # one input is looked through at a time
        self._disk = ThreadPoolExecutor(1, "batches")  # records are written in the order of their changes
        self._tasks: dict[str, asyncio.Task[None]] = {}  # the lives of those that have not ended
        self._working: dict[str, asyncio.Task[None]] = {}  # within them, what runs lines
        self.records: dict[str, Record] = {}  # in the order of their creation
        if fleet.config.files_dir is not None:
            found = [read(Record, path) for path in store.root.glob("batches/*.json")]
            self.records = {record.id: record for record in sorted(found, key=lambda record: (record.created_at, record.id))}
            store.tidy(id for record in found if not record.ended for id in (record.output_id, record.error_id))

    @asynccontextmanager
    async def running(self, app: ASGIApp) -> AsyncGenerator[None]:
        """For as long as the application lives: what has not ended goes on, and stops where it is at the end."""
        self._app, self._slots = app, asyncio.Semaphore(self._most)
        for record in self.records.values():
            if not record.ended:
                self._start(record)
        try:
            yield
        finally:
            tasks = list(self._tasks.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._disk.shutdown()
            self._store.close()

    def of(self, owner: str) -> list[Record]:
        """A client's batches, oldest first."""
        return [record for record in self.records.values() if record.owner == owner]

    async def create(self, request: BatchRequest, owner: str) -> Record:
        """A new batch, on disk and on its way. ApiError where it cannot be."""
        if self._store.find(request.input_file_id, owner) is None:
            raise ApiError(400, f"input_file_id: there is no file '{request.input_file_id}'", param="input_file_id")
        self._store.reserve(owner, 0)
        own = self.of(owner)
        if sum(not record.ended for record in own) >= MAX_OPEN:
            raise ApiError(429, f"you have {MAX_OPEN} batches that have not ended", code="rate_limit_exceeded", headers={"retry-after": "60"})
        if len(own) >= MAX_KEPT:
            oldest = next(record for record in own if record.ended)
            del self.records[oldest.id]
            self._path(oldest).unlink(missing_ok=True)
        now = int(time.time())
        record = Record(
            id=new_id("batch_"),
            owner=owner,
            endpoint=request.endpoint,
            input_file_id=request.input_file_id,
            completion_window=request.completion_window,
            created_at=now,
            expires_at=now + 3600 * int(request.completion_window[:-1]),
            output_id=new_id("file-"),
            error_id=new_id("file-"),
            metadata=request.metadata,
            output_seconds=request.output_expires_after.seconds if request.output_expires_after is not None else None,
        )
        await self._save(record)
        self.records[record.id] = record
        self._start(record)
        return record

    async def cancel(self, record: Record) -> None:
        """Starts no more of its lines, and gives up those that run. ApiError 409 if it is too late for that."""
        if record.ended or record.status == "finalizing":
            raise ApiError(409, f"the batch cannot be cancelled: it is {record.status}", code="batch_not_cancellable")
        if record.status == "cancelling":
            return
        saved = self._enter(record, "cancelling")
        if record.id in self._working:
            self._working[record.id].cancel()
        await saved

    def _enter(self, record: Record, status: str) -> Awaitable[None]:
        """The next status, at once; to be awaited until it is on disk."""
        record.status = status
        record.times[status] = int(time.time())
        return self._save(record)

    def _save(self, record: Record) -> Awaitable[None]:
        text = msgspec.json.encode(record)
        return asyncio.get_running_loop().run_in_executor(self._disk, write, text, self._path(record))

    def _path(self, record: Record) -> Path:
        return self._store.root / "batches" / f"{record.id}.json"

    # ------------------------------------------------------------------------------------------------------ running

    def _start(self, record: Record) -> None:
        self._store.needed[record.input_file_id] += 1
        task = self._tasks[record.id] = asyncio.create_task(self._live(record))
        task.add_done_callback(lambda _: self._done(record))

    def _done(self, record: Record) -> None:
        self._store.needed[record.input_file_id] -= 1
        del self._tasks[record.id]

    @property
    def _most(self) -> int:
        """Lines that may run at once: half of what the engine can. That they do not hold up others is the scheduler's business."""
        return max(1, int(self._fleet.default.engine.info.get("max_num_seqs", 256)) // 2)

    async def _live(self, record: Record) -> None:
        """From wherever a batch is to its end. A server that stops leaves it where it is."""
        client = self._fleet.keys.of(record.owner) if self._fleet.keys is not None else None
        if record.owner != ("" if client is None else client.owner) or (client is None and self._fleet.keys is not None):
            log.warning("%s does not go on: there is no key here of the client whose it is", record.id)
            await asyncio.Future()
        caller, results = Caller(client, background=True), None
        try:
            if not await self._valid(record):
                return
            paths = [self._store.path(id) for id in (record.output_id, record.error_id)]
            results = await asyncio.to_thread(Results, *paths)
            await self._finish(record, results, await self._work(record, results, caller))
        except Exception as e:
            await self._fail(record, results, e)
        finally:
            if results is not None:
                results.close()

    async def _fail(self, record: Record, results: Results | None, error: Exception) -> None:
        """Ends a batch that cannot go on."""
        log.error("%s failed", record.id, exc_info=error)
        why = f"its files cannot be read or written: {error.strerror}" if isinstance(error, OSError) else "internal error; the server's log says more"
        record.errors = [LineError("server_error", why)]
        try:
            await self._finish(record, results, "failed")
        except OSError as e:
            log.error("%s: its end cannot be stored (%s); the next start tries again", record.id, e)
            record.status = "failed"

    async def _valid(self, record: Record) -> bool:
        """Looks through the input, if that has not been done; False if that was the batch's end."""
        if record.status != "validating":
            return True
        async with self._checking:
            found: Checked = await asyncio.to_thread(check, self._lines(record), MAX_LINES)
        if record.status == "cancelling":
            return True
        record.total, record.model, record.errors = found.total, found.model, found.errors
        await self._enter(record, "failed" if found.errors else "in_progress")
        return not found.errors

    def _lines(self, record: Record) -> Iterator[Line | LineError]:
        """The input, read in a thread that leaves the event loop its time."""
        longest = (self._fleet.config.max_body_mib << 20) + LINE_OVERHEAD
        for number, line in enumerate(read_lines(self._store.path(record.input_file_id), longest, record.endpoint)):
            if number % 32 == 31:
                time.sleep(0.0005)
            yield line

    async def _work(self, record: Record, results: Results, caller: Caller) -> str:
        """Runs what is left; how that ended."""
        left = (line for line in self._lines(record) if isinstance(line, Line) and line.custom_id not in results.done)

        async def run(line: Line) -> Result:
            return await ask(self._app, line, caller)

        async def keep(some: list[Result]) -> None:
            await asyncio.to_thread(results.add, some)
            _count(record, results)

        _count(record, results)
        if record.status == "cancelling":
            return "cancelled"
        pace = caller.client.pace if caller.client is not None else None
        work = self._working[record.id] = asyncio.create_task(Runner(run, keep, self._slots, self._most, pace).all(left))
        try:
            await asyncio.wait((work,), timeout=max(0.0, record.expires_at - time.time()))
        finally:
            del self._working[record.id]
            work.cancel()
            (ended,) = await asyncio.gather(work, return_exceptions=True)
        if isinstance(ended, Exception):
            raise ended
        return "cancelled" if record.status == "cancelling" else "completed" if len(results.done) >= record.total else "expired"

    async def _finish(self, record: Record, results: Results | None, end: str) -> None:
        """What is there becomes files of the client's, and the batch has ended."""
        if record.status != "cancelling":
            await self._enter(record, "finalizing")
        if results is not None:
            if end == "expired":
                await asyncio.to_thread(self._expire, record, results)
            _count(record, results)
            record.usage = results.usage.shown()
            record.output_file_id = await self._keep(record, record.output_id, "output")
            record.error_file_id = await self._keep(record, record.error_id, "error")
        await self._enter(record, end)
        log.info("%s is %s: %d of %d lines, %d failed", record.id, end, record.completed, record.total, record.failed)

    def _expire(self, record: Record, results: Results) -> None:
        """A line in the error file for every line that was not run."""
        why = {"code": "batch_expired", "message": "the request was not run before the end of the completion window"}
        left = (line for line in self._lines(record) if isinstance(line, Line) and line.custom_id not in results.done)
        while some := list(islice(left, 1000)):
            results.add([Result(line, error=why) for line in some])

    async def _keep(self, record: Record, id: str, name: str) -> str | None:
        """Makes results a file of the client's; None if there are none."""
        path, now = self._store.path(id), int(time.time())
        size = path.stat().st_size
        if not size:
            path.unlink()
            return None
        life = record.output_seconds
        await self._store.keep(Entry(id, size, now, f"{record.id}_{name}.jsonl", "batch_output", record.owner, None if life is None else now + life))
        return id


def _count(record: Record, results: Results) -> None:
    record.completed, record.failed = results.completed, results.failed


# ------------------------------------------------------------------------------------------------------------ routes


def router(fleet: Fleet, batches: Batches) -> APIRouter:
    """The routes below /v1/batches."""
    routes = APIRouter(prefix="/v1/batches")

    def find(id: str) -> Record:
        record = batches.records.get(id)
        if record is None or record.owner != owner():
            raise ApiError(404, f"there is no batch '{id}'", param="batch_id")
        return record

    def show(record: Record) -> Response:
        return Response(encode(record.shown()), media_type="application/json")

    @routes.post("", **described(BatchRequest, BatchShape))
    async def create(http: Request) -> Response:
        return show(await batches.create(await fleet.body(http, BatchRequest), owner()))

    @routes.get("", **described(answer=BatchList))
    async def list_batches(after: str | None = None, limit: Annotated[int, Query(ge=1, le=100)] = 20) -> Response:
        records, more = page(batches.of(owner()), after, limit)
        return listed([record.shown() for record in records], more)

    @routes.get("/{batch_id}", **described(answer=BatchShape))
    async def look(batch_id: str) -> Response:
        return show(find(batch_id))

    @routes.post("/{batch_id}/cancel", **described(answer=BatchShape))
    async def cancel(batch_id: str) -> Response:
        record = find(batch_id)
        await batches.cancel(record)
        return show(record)

    return routes
