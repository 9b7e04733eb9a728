"""The lines of a batch: read and checked, run through the application itself, and written out. `miniinfer batch` and /v1/batches are made of this.

Owns what a line may hold, the shape of a result, and how many lines run at once. Knows nothing of batches as objects (batches.py), nor of whose they
are, beyond the Caller that a line is run for.
"""

from __future__ import annotations

import asyncio
import codecs
import itertools
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message

from miniinfer.serve.admission import INSIDE, Caller
from miniinfer.serve.answers import encode
from miniinfer.serve.storage import Lines, new_id
from miniinfer.utils import get_logger

log = get_logger(__name__)

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
MAX_ID = 512  # characters of a custom_id
MAX_ERRORS = 100  # shown of a file
MAX_BLANK = 1000  # lines
AGAIN, LATEST = 1.0, 60.0  # seconds until a line is tried again that the server had no place for, where it does not say when; they double
NO_PLACE = (429, 503)  # statuses that are not the line's fault

# ------------------------------------------------------------------------------------------------------------- lines


class LineError(msgspec.Struct):
    """What is wrong with a batch's input; `line` counts from 1."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """One request. Its body is what the client wrote: the route checks it."""

    number: int
    custom_id: str
    url: str
    body: bytes


class _Wire(msgspec.Struct, forbid_unknown_fields=True):
    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class _Body(msgspec.Struct):
    """Of a body, what makes it one that cannot be in a batch."""

    model: Any = None
    stream: Any = None
    background: Any = None


@dataclass
class Checked:
    """What a look at all lines has found."""

    total: int = 0
    model: str | None = None  # the first line's
    errors: list[LineError] = field(default_factory=list)


def read_lines(path: Path, longest: int, endpoint: str | None = None) -> Iterator[Line | LineError]:
    """The requests of a JSONL file, blank lines left out. A line longer than `longest` bytes ends it; `endpoint`: the only one allowed."""
    blank = 0
    with open(path, "rb") as file:
        for number in itertools.count(1):
            text = file.readline(longest + 1)
            if not text:
                return
            if len(text) > longest:
                yield LineError("line_too_long", f"the line is longer than {longest >> 20} MiB", None, number)
                return
            text = text.removeprefix(codecs.BOM_UTF8) if number == 1 else text
            if text.strip():
                yield _parse(text, number, endpoint)
                continue
            blank += 1
            if blank > MAX_BLANK:  # looking through them is work, too
                yield LineError("too_many_blank_lines", f"more than {MAX_BLANK} lines are blank", None, number)
                return


def _parse(text: bytes, number: int, endpoint: str | None) -> Line | LineError:
    try:
        wire = msgspec.json.decode(text, type=_Wire)
    except msgspec.ValidationError as e:
        named = re.search(r"field `(\w+)`|`\$\.(\w+)`", str(e))
        param = (named[1] or named[2]) if named else None
        code = "missing_required_parameter" if "missing" in str(e) else "invalid_request"
        return LineError(code, str(e), param, number)
    except (ValueError, RecursionError) as e:
        return LineError("invalid_json_line", f"the line is not JSON: {e}", None, number)

    def wrong(param: str, message: str) -> LineError:
        return LineError(f"invalid_{param}", f"{param}: {message}", param, number)

    if not 0 < len(wire.custom_id) <= MAX_ID:
        return wrong("custom_id", f"must have from 1 to {MAX_ID} characters")
    if wire.method != "POST":
        return wrong("method", f"must be POST, got {wire.method!r}")
    if wire.url not in ENDPOINTS or endpoint not in (None, wire.url):
        return wrong("url", f"must be {endpoint or ' or '.join(ENDPOINTS)}, got {wire.url[:80]!r}")
    try:
        body = msgspec.json.decode(wire.body, type=_Body)
    except (ValueError, RecursionError) as e:
        return wrong("body", f"must be a JSON object: {e}")
    for name in ("stream", "background"):
        if getattr(body, name) not in (None, False):
            return wrong("body", f"'{name}' cannot be used in a batch, whose answers are in its output file")
    return Line(number, wire.custom_id, wire.url, bytes(wire.body))


def check(lines: Iterable[Line | LineError], most: int | None = None) -> Checked:
    """Looks at all lines of an input before any is run: the first MAX_ERRORS of what is wrong, and how many lines there are."""
    found, first = Checked(), dict[str, int]()
    for line in lines:
        if isinstance(line, Line):
            before = first.setdefault(line.custom_id, line.number)
            if before != line.number:
                line = LineError("duplicate_custom_id", f"custom_id: {line.custom_id!r} is line {before}'s", "custom_id", line.number)
            elif found.total == 0:
                found.model = _text(msgspec.json.decode(line.body, type=_Body).model)
        found.total += 1
        if isinstance(line, LineError):
            found.errors.append(line)
        if len(found.errors) >= MAX_ERRORS:
            return found
        if most is not None and found.total > most:
            found.errors.append(LineError("too_many_requests", f"the file has more than {most} requests; split it"))
            return found
    if not found.total:
        found.errors.append(LineError("empty_file", "the file has no requests"))
    return found


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


# ----------------------------------------------------------------------------------------------------------- results


@dataclass
class Result:
    """What has become of a line: an answer of the application's, or why there is none."""

    line: Line
    id: str = field(default_factory=lambda: new_id("batch_req_"))
    status: int = 0
    body: bytes = b"null"
    error: dict[str, str] | None = None
    again: bool = False  # the server had no place for it
    retry_after: float = 0.0  # seconds, if it said how long that would be so

    @property
    def ok(self) -> bool:
        return self.status == 200

    def encoded(self) -> bytes:
        """A line of an output or error file."""
        response = {"status_code": self.status, "request_id": self.id, "body": msgspec.Raw(self.body)} if self.error is None else None
        return encode({"id": self.id, "custom_id": self.line.custom_id, "response": response, "error": self.error}) + b"\n"


class _Details(msgspec.Struct):
    cached_tokens: int = 0
    reasoning_tokens: int = 0


class _Used(msgspec.Struct):
    """An answer's `usage`, in either of the two ways in which OpenAI's APIs say it."""

    prompt_tokens: int = 0
    input_tokens: int = 0
    completion_tokens: int = 0
    output_tokens: int = 0
    prompt_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None


class Usage:
    """Tokens of many answers."""

    def __init__(self) -> None:
        self.input = self.cached = self.output = self.reasoning = 0

    def add(self, used: _Used) -> None:
        before, after = used.prompt_tokens_details or used.input_tokens_details, used.completion_tokens_details or used.output_tokens_details
        self.input += used.prompt_tokens or used.input_tokens
        self.output += used.completion_tokens or used.output_tokens
        self.cached += before.cached_tokens if before is not None else 0
        self.reasoning += after.reasoning_tokens if after is not None else 0

    def shown(self) -> dict[str, Any]:
        """In the words of OpenAI's batches."""
        details = {"input_tokens_details": {"cached_tokens": self.cached}, "output_tokens_details": {"reasoning_tokens": self.reasoning}}
        return {"input_tokens": self.input, "output_tokens": self.output, "total_tokens": self.input + self.output, **details}


class _Counted(msgspec.Struct):
    usage: _Used | None = None


class _Response(msgspec.Struct):
    status_code: int
    body: _Counted | None = None


class _Past(msgspec.Struct):
    custom_id: str
    response: _Response | None


class Results:
    """What is done of a batch, on disk. Answers go to the first file, failures to the last, which may be the same one."""

    def __init__(self, *paths: Path) -> None:
        """Goes on where files end. BlockingIOError if somebody else writes them, ValueError that names a line which is no result."""
        self.done: set[str] = set()  # custom_ids
        self.completed = self.failed = 0
        self.usage = Usage()
        self.files: list[Lines] = []
        try:
            for path in paths:
                self.files.append(Lines(path))
                self._count_all(self.files[-1])
        except BaseException:
            self.close()
            raise

    def _count_all(self, lines: Lines) -> None:
        for number, text in enumerate(lines, 1):
            try:
                self._count(text)
            except ValueError as e:
                raise ValueError(f"line {number} of {lines.path} is not a result of a batch: {e}") from None

    def _count(self, text: bytes) -> None:
        past = msgspec.json.decode(text, type=_Past)
        if past.custom_id in self.done:
            raise ValueError(f"custom_id: {past.custom_id!r} is there twice")
        self.done.add(past.custom_id)
        if past.response is None or past.response.status_code != 200:
            self.failed += 1
            return
        self.completed += 1
        if past.response.body is not None and past.response.body.usage is not None:
            self.usage.add(past.response.body.usage)

    def add(self, results: list[Result]) -> None:
        """When this returns, they are on disk."""
        answers, failures = self.files[0], self.files[-1]
        texts = [(answers if result.ok else failures, result.encoded()) for result in results]
        for file in self.files:
            if data := b"".join(text for target, text in texts if target is file):
                file.add(data)
        for _, text in texts:
            self._count(text)

    def close(self) -> None:
        for file in self.files:
            file.close()


# ----------------------------------------------------------------------------------------------------------- running


async def ask(app: ASGIApp, line: Line, caller: Caller) -> Result:
    """A line's answer from the application, as if a client had sent it."""
    result = Result(line)
    head = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(line.body)), (b"x-request-id", result.id.encode())]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": line.url,
        "raw_path": line.url.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": head,
        "client": None,
        "server": None,
        INSIDE: caller,
    }
    sent: list[Message] = [{"type": "http.request", "body": line.body, "more_body": False}]
    body: list[bytes] = []

    async def receive() -> Message:
        return sent.pop() if sent else await asyncio.Future()  # we never go away; who is cancelled is cancelled

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            result.status = message["status"]
            after = dict(message["headers"]).get(b"retry-after", b"")
            result.retry_after = float(after) if after.isdigit() else 0.0
        else:
            body.append(message.get("body", b""))

    try:
        await app(scope, receive, send)
    except Exception:  # the application has logged it, and has made an answer of it if it could
        result.status = result.status or 500
    result.body, result.again = b"".join(body) or b"null", result.status in NO_PLACE
    return result


class Runner:
    """Runs lines, as many at once as there are slots, which others may want, too, but holds at most so many in memory.

    `run` asks for an answer, `keep` writes results: several at a time, if they come faster than it takes them. A line for which the server has no
    place is tried again later; `pace` says how long the next one has to wait in any case."""

    def __init__(
        self,
        run: Callable[[Line], Awaitable[Result]],
        keep: Callable[[list[Result]], Awaitable[None]],
        slots: asyncio.Semaphore,
        most: int,
        pace: Callable[[], float] | None = None,
    ) -> None:
        self._run, self._keep, self._slots, self._pace = run, keep, slots, pace
        self._held, self._turn = asyncio.Semaphore(most), asyncio.Lock()
        self._finished: asyncio.Queue[Result | None] = asyncio.Queue()
        self._taken = 0  # slots
        self._pause, self._delay = 0.0, AGAIN  # until when, on the loop's clock, the server has no place for more; how long that is next time

    async def all(self, lines: Iterator[Line]) -> None:
        """If this is cancelled, what is finished is still kept, and what is not is given up."""
        writer, work = asyncio.create_task(self._write()), asyncio.create_task(self._start(lines))
        try:
            await asyncio.wait((writer, work), return_when=asyncio.FIRST_COMPLETED)  # the writer ends first only if it fails
        finally:
            work.cancel()
            (ended,) = await asyncio.gather(work, return_exceptions=True)
            while self._taken:  # by lines that were given up before they began
                self._leave()
            self._finished.put_nowait(None)
            await writer
        if isinstance(ended, Exception):
            raise ended

    async def _start(self, lines: Iterator[Line]) -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                await self._held.acquire()
                await self._enter()
                line = await asyncio.to_thread(next, lines, None)  # not before there is room for it
                if line is None:
                    self._leave()
                    return
                group.create_task(self._one(line))

    async def _one(self, line: Line) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                result = await self._run(line)
            finally:
                self._leave()
            if not result.again:
                break
            if loop.time() >= self._pause:  # of those that were refused together the first
                self._pause = loop.time() + (result.retry_after or self._delay)
                self._delay = min(LATEST, 2 * self._delay)
            await self._enter()
        self._delay = AGAIN
        self._finished.put_nowait(result)

    async def _enter(self) -> None:
        loop = asyncio.get_running_loop()
        async with self._turn:  # in their order, and none while one waits
            while (wait := max(self._pause - loop.time(), 0.0 if self._pace is None else self._pace())) > 0:
                await asyncio.sleep(wait)
            await self._slots.acquire()
            self._taken += 1

    def _leave(self) -> None:
        self._taken -= 1
        self._slots.release()

    async def _write(self) -> None:
        more = True
        while more:
            got = [await self._finished.get()]
            while not self._finished.empty():
                got.append(self._finished.get_nowait())
            more = None not in got
            if results := [result for result in got if result is not None]:
                await self._keep(results)
                for _ in results:
                    self._held.release()
